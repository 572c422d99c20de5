"""SIGTERM to real processes, plain and under torchrun, while they train, validate and save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from raydist.checkpoint.layout import complete_checkpoints, newest_complete
from raydist.cli.output import EXIT_UNFINISHED
from raydist.config.load import Recipe, dump_yaml, resolve
from raydist.core import storage
from raydist.tracking.jsonl import read_curve, read_records
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.processes import wait_until
from tests.training.cases import quiet_environment, recipe_of, recipe_values, torchrun, write_dataset

pytestmark = pytest.mark.slow

CHANGES = {
    "training.num_steps": 60,
    "training.validate_every_steps": "null",
    "checkpoint.every_steps": 1000,
    "checkpoint.keep": 9,
    "model.overrides.num_layers": 1,
}
ALONE = [sys.executable, "-m", "raydist.cli.main"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def curves_of(recipe: Recipe) -> dict[str, Any]:
    """The curves of an undisturbed run of one worker."""
    run_dir = prepare_run_dir(recipe, resume=False)
    run_attempt(recipe, run_dir=run_dir)
    return read_curve(f"{run_dir}/metrics.jsonl")


def started(recipe: Recipe, tmp_path: Path, launcher: Sequence[str]) -> subprocess.Popen[bytes]:
    (tmp_path / "case.yaml").write_text(dump_yaml(recipe.config))
    command = [*launcher, "train", str(tmp_path / "case.yaml"), "--no-ray"]
    with (tmp_path / "log").open("wb") as log:
        return subprocess.Popen(command, env=quiet_environment(), stdout=log, stderr=subprocess.STDOUT)


def steps_of(path: str) -> list[int]:
    return [record["step"] for record in read_records(path) if "loss" in record]


def assert_goes_on(recipe: Recipe, run_dir: str, expected: dict[str, Any], names: Sequence[str] = ("loss",)) -> float:
    """Resumes to the end on one worker; returns the seconds that it took."""
    begun = time.monotonic()
    assert run_attempt(recipe, run_dir=run_dir).step == recipe.config.training.num_steps
    took_s = time.monotonic() - begun
    for name in names:
        assert read_curve(f"{run_dir}/metrics.jsonl")[name] == expected[name]
    steps = steps_of(f"{run_dir}/metrics.jsonl")
    assert steps == sorted(set(steps)), "a step was done twice"
    return took_s


def test_sigterm_during_training(dataset: str, tmp_path: Path, record_fault: Callable[..., None]) -> None:
    recipe = recipe_of(dataset, tmp_path, **CHANGES)
    metrics = f"{tmp_path}/run/metrics.jsonl"
    process = started(recipe, tmp_path, ALONE)
    wait_until(lambda: len(steps_of(metrics)) >= 5, timeout_s=120, what="five steps")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == EXIT_UNFINISHED, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "received SIGTERM" in log
    assert "Traceback" not in log
    newest = newest_complete(f"{tmp_path}/run")
    assert newest is not None
    assert newest.step == steps_of(metrics)[-1] < 60
    expected = curves_of(recipe_of(dataset, tmp_path / "whole", **CHANGES))
    took_s = assert_goes_on(recipe, f"{tmp_path}/run", expected)
    record_fault("SIGTERM during training", "saved, resumed bit for bit", steps_lost=0, recovery_s=took_s)


def test_sigterm_during_validation(dataset: str, tmp_path: Path, record_fault: Callable[..., None]) -> None:
    changes = {
        **CHANGES, "training.num_steps": 6, "training.validate_every_steps": 5, "training.validation_batches": 300,
    }  # fmt: skip
    recipe = recipe_of(dataset, tmp_path, **changes)
    metrics = f"{tmp_path}/run/metrics.jsonl"
    process = started(recipe, tmp_path, ALONE)
    wait_until(lambda: steps_of(metrics)[-1:] == [4], timeout_s=120, what="the step before the validation")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == EXIT_UNFINISHED, (tmp_path / "log").read_text()
    newest = newest_complete(f"{tmp_path}/run")
    assert newest is not None
    assert newest.step == 5
    assert "loss" in newest.read_trainer_state()["unlogged"], "the validation was not cut off"
    assert steps_of(metrics) == [1, 2, 3, 4]
    expected = curves_of(recipe_of(dataset, tmp_path / "whole", **changes))
    took_s = assert_goes_on(recipe, f"{tmp_path}/run", expected, ("loss", "validation/loss"))
    record_fault("SIGTERM during validation", "saved, resumed bit for bit", steps_lost=0, recovery_s=took_s)


def test_sigterm_during_a_save(
    bucket: str, s3_proxy: FaultyProxy, dataset: str, tmp_path: Path, record_fault: Callable[..., None]
) -> None:
    changes = {**CHANGES, "checkpoint.every_steps": 10}
    values = {**recipe_values(dataset, tmp_path, **changes), "output_dir": f"{bucket}/runs"}
    recipe = resolve(values, path="case.yaml")
    run_dir = f"{bucket}/runs/run"
    process = started(recipe, tmp_path, ALONE)
    s3_proxy.slow(bytes_per_s=150_000)
    spool = tmp_path / "tmp" / f"raydist-{os.getuid()}"
    wait_until(lambda: any(spool.glob("*.safetensors")), timeout_s=120, what="a shard in the spool")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == EXIT_UNFINISHED, (tmp_path / "log").read_text()
    s3_proxy.pass_all()
    steps = [checkpoint.step for checkpoint in complete_checkpoints(run_dir)]
    assert steps[0] == 10, "the save in flight was lost"
    assert steps_of(f"{run_dir}/metrics.jsonl")[-1] == steps[-1]
    expected = curves_of(recipe_of(dataset, tmp_path / "whole", **changes))
    took_s = assert_goes_on(recipe, run_dir, expected)
    assert [path for path in spool.rglob("*") if path.is_file()] == []
    assert not [name for name in storage.list_files(run_dir) if "partial" in name]
    record_fault("SIGTERM during a save", "both saves stored, resumed bit for bit", steps_lost=0, recovery_s=took_s)


def test_sigterm_to_torchrun_reaches_all_workers(
    dataset: str, tmp_path: Path, record_fault: Callable[..., None]
) -> None:
    recipe = recipe_of(dataset, tmp_path, **{**CHANGES, "training.num_steps": 200})
    metrics = f"{tmp_path}/run/metrics.jsonl"
    process = started(recipe, tmp_path, torchrun(2))
    wait_until(lambda: len(steps_of(metrics)) >= 5, timeout_s=180, what="five steps")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    newest = newest_complete(f"{tmp_path}/run")
    assert newest is not None, (tmp_path / "log").read_text()
    assert newest.world_size == 2
    assert newest.step == steps_of(metrics)[-1] < 200
    record_fault("SIGTERM to torchrun, two workers", "both saved at one step", steps_lost=0, recovery_s=None)
