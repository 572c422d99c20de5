"""One training run, computed in every way it can be, against a plain single process without sharding.

The dataset's records carry prompts of very different lengths without loss, each row has its own mask probability, and four
microbatches are accumulated: averaging over ranks or microbatches instead of dividing by the global denominator would
show in the first step.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from data_loaders.loader import Loader
from raydist.config.load import Recipe, dump_yaml
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.tracking.jsonl import read_curve
from raydist.training.batches import StepBatch, step_batch_maker
from raydist.training.data import open_data
from raydist.training.hooks import Hook
from raydist.training.lr import learning_rate_factor
from raydist.training.meters import Meters
from raydist.training.model import decoder_config
from raydist.training.optim import GuardedAdamW
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from raydist.training.step import NonFiniteGuard, train_step
from tests.training.cases import quiet_environment, recipe_of, torchrun


class StopAt(Hook):
    """A crash in the middle of a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, step: int, metrics: object) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def losses(run_dir: str | Path) -> list[tuple[int, float]]:
    return read_curve(f"{run_dir}/metrics.jsonl")["loss"]


def plain_losses(recipe: Recipe) -> list[float]:
    """The reference: no process group, no sharding, no loop class."""
    config = recipe.config
    data = open_data(config.data, seed=config.seed)
    objective = config.objective.build(data.ids)
    model_config = decoder_config(config.model, data=data, seq_len=config.data.seq_len, needs=objective.needs)
    model = Decoder(model_config)
    initialize(model, config.seed)
    optimizer = GuardedAdamW(model.named_parameters(), config.training.optimizer)
    make = step_batch_maker(objective, noise_seed=config.seed, microbatch_rows=8)
    loader: Loader[StepBatch] = Loader(data.train, batch_rows=config.training.batch_rows, num_steps=20, transform=make)
    guard = NonFiniteGuard.create(torch.device("cpu"))
    values = []
    for step, batch in enumerate(loader):
        factor = learning_rate_factor(config.training.learning_rate_schedule, step, num_steps=20)
        optimizer.set_learning_rate(config.training.optimizer.learning_rate * factor)
        meters = Meters()
        train_step(
            model, objective, optimizer, batch, device=torch.device("cpu"), clip_norm=1.0, guard=guard, meters=meters
        )
        values.append(meters.read()["loss"])
    return values


def two_workers(recipe: Recipe, folder: Path, *flags: str) -> None:
    (folder / "case.yaml").write_text(dump_yaml(recipe.config))
    command = torchrun(2, "train", str(folder / "case.yaml"), "--no-ray", *flags)
    done = subprocess.run(command, env=quiet_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_mistake_under_torchrun_is_said_once_and_ends_all_workers(on_one: tuple[Recipe, str], tmp_path: Path) -> None:
    recipe, run_dir = on_one
    path = tmp_path / "case.yaml"
    path.write_text(dump_yaml(recipe.config))
    command = torchrun(2, "train", str(path), "--no-ray")
    done = subprocess.run(command, env=quiet_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert done.stderr.count("this run name is in use") == 1
    assert run_dir in done.stderr
    assert "raydist/cli/main.py" not in done.stderr, "a traceback of ours"
    assert "RuntimeError" not in done.stderr
    assert "exitcode  : 2 " in done.stderr


def back_to_step_10(source: str | Path, target: Path) -> Path:
    """A copy of a run whose last checkpoint is step 10."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-00000020")
    return target


@pytest.fixture(scope="module")
def on_one(uneven_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, str]:
    recipe = recipe_of(uneven_dataset, tmp_path_factory.mktemp("one"))
    run_dir = prepare_run_dir(recipe, resume=False)
    run_attempt(recipe, run_dir=run_dir)
    return recipe, run_dir


@pytest.fixture(scope="module")
def on_two(uneven_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, str]:
    folder = tmp_path_factory.mktemp("two")
    recipe = recipe_of(uneven_dataset, folder, **{"scaling.num_workers": 2})
    two_workers(recipe, folder)
    return recipe, f"{folder}/run"


def test_sharded_equals_plain_on_one_and_two_workers(on_one: tuple[Recipe, str], on_two: tuple[Recipe, str]) -> None:
    plain = plain_losses(on_one[0])
    assert len(plain) == 20
    assert plain[-1] < 0.9 * plain[0], "the run must learn something, or equality says little"
    for _, run_dir in (on_one, on_two):
        curve = losses(run_dir)
        assert [step for step, _ in curve] == list(range(1, 21))
        assert [value for _, value in curve] == pytest.approx(plain, rel=1e-6)


def test_validation_does_not_depend_on_the_number_of_workers(
    on_one: tuple[Recipe, str], on_two: tuple[Recipe, str]
) -> None:
    one, two = (read_curve(f"{run_dir}/metrics.jsonl")["validation/loss"] for _, run_dir in (on_one, on_two))
    assert [step for step, _ in one] == [10, 20] == [step for step, _ in two]
    assert [value for _, value in two] == pytest.approx([value for _, value in one], rel=1e-6)


def test_a_crash_and_a_resume_change_no_bit(on_one: tuple[Recipe, str], uneven_dataset: str, tmp_path: Path) -> None:
    recipe = recipe_of(uneven_dataset, tmp_path)
    run_dir = prepare_run_dir(recipe, resume=False)
    with pytest.raises(KeyboardInterrupt):
        run_attempt(recipe, run_dir=run_dir, hooks=[StopAt(13)])
    assert len(losses(run_dir)) == 13
    run_attempt(recipe, run_dir=prepare_run_dir(recipe, resume=True))
    assert losses(run_dir) == losses(on_one[1])


def test_two_workers_go_on_as_one(on_one: tuple[Recipe, str], on_two: tuple[Recipe, str], tmp_path: Path) -> None:
    back_to_step_10(on_two[1], tmp_path / "run")
    recipe, _ = on_one
    config = recipe.config.model_copy(update={"output_dir": str(tmp_path)})
    recipe = Recipe(config, recipe.config_hash, recipe.path)
    run_attempt(recipe, run_dir=prepare_run_dir(recipe, resume=True))
    assert dict(losses(tmp_path / "run")) == pytest.approx(dict(losses(on_one[1])), rel=1e-5)


def test_one_worker_goes_on_as_two(on_one: tuple[Recipe, str], tmp_path: Path) -> None:
    back_to_step_10(on_one[1], tmp_path / "run")
    recipe, _ = on_one
    two_workers(Recipe(recipe.config.model_copy(update={"output_dir": str(tmp_path)}), "", ""), tmp_path, "--resume")
    assert dict(losses(tmp_path / "run")) == pytest.approx(dict(losses(on_one[1])), rel=1e-5)


def test_checkpoint_of_the_last_step_holds_the_exported_weights(on_one: tuple[Recipe, str]) -> None:
    from raydist.models.hf import load_decoder

    decoder, meta = load_decoder(f"{on_one[1]}/export")
    assert meta["objective"]["name"] == "set_block"
    assert decoder.config.num_layers == 2
    data = open_data(on_one[0].config.data, seed=0)
    objective = on_one[0].config.objective.build(data.ids)
    assert data.validation is not None
    loader: Loader[StepBatch] = Loader(data.validation, batch_rows=8)
    make = step_batch_maker(objective, noise_seed=0x5EED, microbatch_rows=8)
    loss_sum, num_targets = 0.0, 0.0
    with torch.no_grad():
        for step in range(2):
            batch = make(loader.rows(first_sample=8 * step, step=step))
            results = decoder(**batch.microbatches[0].inputs, terms=batch.microbatches[0].terms)
            loss_sum += sum(float(result.loss_sum) for result in results)
            num_targets += batch.counts["targets"]
    last = read_curve(f"{on_one[1]}/metrics.jsonl")["validation/loss"][-1]
    assert last == (20, pytest.approx(loss_sum / num_targets, rel=1e-5))
