"""The best checkpoint of a run stays beside its newest one, and a sweep's trials keep no more than these two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydist.checkpoint.layout import steps_on_storage
from raydist.checkpoint.retention import delete_expired, expired_steps
from raydist.config.schema import KeepBestConfig
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from tests.training.cases import recipe_of, write_dataset

LOSS = "validation/loss/ntp"


@pytest.mark.parametrize(
    ("complete", "current", "costs", "expired"),
    [
        ([10, 20, 30], 30, {10: 3.0, 20: 1.0, 30: 2.0}, [10]),
        ([10, 20, 30], 30, {10: 3.0, 20: 2.0, 30: 1.0}, [10, 20]),
        ([10, 20, 30], 30, {10: 1.0, 20: 1.0, 30: 1.0}, [20]),
        ([10, 20, 30], 30, {20: 9.0}, [10]),
        ([10, 20, 30], 30, {}, [10, 20]),
        # Of a course that the run left: not the best of this one.
        ([10, 20, 30], 20, {10: 2.0, 20: 3.0, 30: 1.0}, [30]),
    ],
)
def test_table(complete: list[int], current: int, costs: dict[int, float], expired: list[int]) -> None:
    assert expired_steps(complete, [], current=current, keep=1, costs=costs) == expired


@pytest.mark.parametrize(("mode", "kept"), [("min", [20]), ("max", [5, 20])])
def test_a_run_keeps_its_best_and_its_last(mode: str, kept: list[int], tmp_path: Path) -> None:
    """The loss falls, so that its largest value is the first one."""
    dataset = write_dataset(tmp_path)
    best = f"{{metric: {LOSS}, mode: {mode}}}"
    changes = {"checkpoint.every_steps": 5, "checkpoint.keep": 1, "checkpoint.keep_best": best}
    recipe = recipe_of(dataset, tmp_path, **changes, **{"training.validate_every_steps": 5})
    run_dir = prepare_run_dir(recipe, resume=False)
    run_attempt(recipe, run_dir=run_dir)
    assert steps_on_storage(run_dir) == kept
    states = [
        json.loads(Path(run_dir, "checkpoints", f"step-{step:08d}", "trainer.json").read_text())["validation"][LOSS]
        for step in kept
    ]
    assert states == sorted(states, reverse=True)


def test_checkpoints_that_were_not_validated_or_cannot_be_read_are_not_the_best(tmp_path: Path) -> None:
    values = {10: '{"validation": {"x": 1.0}}', 20: '{"validation": {"x": NaN}}', 30: "{}", 40: "torn", 50: "{}"}
    for step, text in values.items():
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(text)
        (folder / "complete.json").write_text("{}")
    gone = delete_expired(str(tmp_path), current=50, keep=1, keep_best=KeepBestConfig(metric="x"))
    assert gone == [20, 30, 40]
