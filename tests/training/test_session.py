"""What stops a run, and what it says then."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from data_loaders.loader import Loader
from data_loaders.tokenizer import Tokenizer
from raydist.checkpoint.layout import newest_complete
from raydist.config.load import resolve
from raydist.core.errors import ConfigError, DataError, NonFiniteError, ResumeError, TokenizerError
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.hf import save_hf
from raydist.models.init import initialize
from raydist.objectives.set_block import SetBlock
from raydist.tracking.jsonl import read_curve
from raydist.training.driver import conduct
from raydist.training.hooks import Hook
from raydist.training.loop import TrainLoop
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from tests.training.cases import recipe_of, recipe_values, write_dataset


def run(recipe: Any, *, resume: bool = False) -> str:
    run_dir = prepare_run_dir(recipe, resume=resume)
    run_attempt(recipe, run_dir=run_dir)
    return run_dir


def test_a_nan_stops_the_run_before_it_reaches_a_weight(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"checkpoint.every_steps": 5, "training.log_every_steps": 10}
    whole = SetBlock.terms

    def poisoned(self: SetBlock, noised: Any) -> Any:
        terms = whole(self, noised)
        return [dataclasses.replace(terms[0], weights_T=torch.full(terms[0].positions_T.shape, weight)), *terms[1:]]

    recipe = recipe_of(dataset, tmp_path / "my runs", **changes)
    run_dir = prepare_run_dir(recipe, resume=False)
    calls = iter(range(10_000))
    weight = 1.0

    def poisoned_at_step_7(self: SetBlock, noised: Any) -> Any:
        nonlocal weight
        weight = float("nan") if next(calls) == 7 * 4 + 1 else 1.0
        return poisoned(self, noised)

    monkeypatch.setattr(SetBlock, "terms", poisoned_at_step_7)
    with pytest.raises(NonFiniteError, match="step 7") as caught:
        run_attempt(recipe, run_dir=run_dir)
    assert f"raydist data show --run '{run_dir}' --step 7\n" in (caught.value.fix or "")
    newest = newest_complete(run_dir)
    assert newest is not None
    assert newest.step == 5
    assert [step for step, _ in read_curve(f"{run_dir}/metrics.jsonl")["loss"]] == [5]


def test_changed_data_is_refused_on_resume(dataset: str, tmp_path: Path) -> None:
    moved = tmp_path / "data"
    shutil.copytree(dataset, moved)
    recipe = recipe_of(str(moved), tmp_path, **{"training.num_steps": 2})
    run(recipe)
    shutil.rmtree(moved)
    (tmp_path / "other").mkdir()
    shutil.move(write_dataset(tmp_path / "other", prompt_chars=10), moved)
    with pytest.raises(ResumeError, match="data changed"):
        run(recipe, resume=True)


def test_missing_dataset_leaves_no_run_behind(tmp_path: Path) -> None:
    recipe = recipe_of(str(tmp_path / "nowhere"), tmp_path / "runs")
    with pytest.raises(DataError) as caught:
        conduct(recipe, resume=False, attempts=lambda recipe, run_dir: pytest.fail("must not start"))
    assert "nowhere" in str(caught.value)
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"data.seq_len": 100_000}, (DataError, ConfigError), "seq_len|rows are longer|too short|too long"),
        ({"model.preset": "debugg"}, ConfigError, "no such model"),
        ({"model.overrides.num_layerss": 3}, ConfigError, "unknown key"),
        ({"model.overrides.max_positions": 16}, ConfigError, "longer than the model"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(
    dataset: str, tmp_path: Path, changes: dict[str, Any], error: Any, match: str
) -> None:
    with pytest.raises(error, match=match):
        run(recipe_of(dataset, tmp_path, **changes))


def swapped_letters(tokenizer: Path) -> str:
    """The same tokenizer with two letters' ids the other way round."""
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("missing_rows", "tokenizer_of", "found"),
    [(250, None, "rows in the model"), (0, swapped_letters, "a probe text becomes")],
    ids=["another size", "the same size"],
)
def test_weights_of_another_tokenizer_are_refused(
    dataset: str, tmp_path: Path, missing_rows: int, tokenizer_of: Callable[[Path], str] | None, found: str
) -> None:
    own = Path(dataset, "train", "tokenizer.json")
    config = DecoderConfig(
        family="llama",
        vocab_size=Tokenizer.load(str(own)).vocab_size - missing_rows,
        num_layers=1, width=8, hidden_width=8, num_heads=1, num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    decoder = Decoder(config)
    initialize(decoder, 0)
    save_hf(
        str(tmp_path / "hf"),
        state=dict(decoder.named_parameters()),
        config=config,
        tokenizer_json=None if tokenizer_of is None else tokenizer_of(own),
        token_ids={},
        extra={},
    )
    values = {**recipe_values(dataset, tmp_path / "runs"), "model": {"init_from": str(tmp_path / "hf")}}
    with pytest.raises(TokenizerError, match="not the model's") as caught:
        run(resolve(values, path="case.yaml"))
    assert found in (caught.value.found or "")


def test_a_run_goes_on_from_exported_weights(dataset: str, tmp_path: Path) -> None:
    first = run(recipe_of(dataset, tmp_path, **{"training.num_steps": 12}))
    second = run(
        recipe_of(
            dataset, tmp_path, **{"name": "second", "model.init_from": f"{first}/export", "training.num_steps": 2}
        )
    )
    before = read_curve(f"{first}/metrics.jsonl")["loss"]
    after = read_curve(f"{second}/metrics.jsonl")["loss"]
    assert after[0][1] < before[0][1] - 0.5  # the same rows and noise, better weights


def test_a_sampler_that_does_not_fit_is_refused_before_the_first_step(dataset: str, tmp_path: Path) -> None:
    changes = {"objective": "{name: masked}", "sampling.sampler": "{name: set_block}", "sampling.prompts": "[a]"}
    recipe = recipe_of(dataset, tmp_path, **changes)
    run_dir = prepare_run_dir(recipe, resume=False)
    with pytest.raises(ConfigError, match="another sampler"):
        run_attempt(recipe, run_dir=run_dir)
    assert newest_complete(run_dir) is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sampling.prompts": "['']"}, "a prompt has no tokens"),
        ({"sampling.prompts": "[a]", "sampling.max_new_tokens": 100_000}, "longer than the model's positions"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_before_the_first_step(
    dataset: str, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    recipe = recipe_of(dataset, tmp_path, **changes)
    run_dir = prepare_run_dir(recipe, resume=False)
    with pytest.raises(ConfigError, match=match) as caught:
        run_attempt(recipe, run_dir=run_dir)
    assert caught.value.where == "sampling.prompts[0]"
    assert newest_complete(run_dir) is None


class StopAt(Hook):
    """Asks for the end at one validation, and remembers at which it was asked."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.asked: list[int] = []

    def wants_stop(self, step: int, metrics: Mapping[str, float]) -> bool:
        assert "validation/loss" in metrics
        self.asked.append(step)
        return step == self.step


def test_a_hook_ends_a_run_at_a_validation_and_it_can_go_on(dataset: str, tmp_path: Path) -> None:
    changes = {"training.num_steps": 8, "training.validate_every_steps": 2, "checkpoint.every_steps": 2}
    recipe = recipe_of(dataset, tmp_path, **changes)
    run_dir = prepare_run_dir(recipe, resume=False)
    hook = StopAt(4)
    outcome = run_attempt(recipe, run_dir=run_dir, hooks=[hook], driver_tracks=True)
    assert (outcome.step, outcome.stopped, hook.asked) == (4, True, [2, 4])
    assert not (Path(run_dir) / "export").exists()
    again = run_attempt(recipe, run_dir=run_dir, hooks=[StopAt(0)], driver_tracks=True)
    assert (again.step, again.stopped) == (8, False)
    assert (Path(run_dir) / "export" / "model.safetensors").exists()
    assert not (Path(run_dir) / "pictures").exists(), "pictures are the driver's then"
    whole = recipe_of(dataset, tmp_path / "whole", **changes)
    assert run_attempt(whole, run_dir=prepare_run_dir(whole, resume=False)).metrics["loss"] == again.metrics["loss"]


def test_the_last_save_does_not_wait_for_the_loader(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader's thread may hang in a bucket that is away."""
    events: list[str] = []
    finish_saves, close = TrainLoop.finish_saves, Loader.close
    monkeypatch.setattr(TrainLoop, "finish_saves", lambda self: (finish_saves(self), events.append("saved")))
    monkeypatch.setattr(Loader, "close", lambda self: (events.append("closed"), close(self)))
    run(recipe_of(dataset, tmp_path, **{"training.num_steps": 2}))
    assert events[-2:] == ["saved", "closed"]
