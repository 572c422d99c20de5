"""SIGKILL at each stage of a save into a real bucket."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydist.checkpoint.layout import complete_checkpoints
from raydist.core import storage
from raydist.tracking.jsonl import read_records
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from tests.faults.bucket_runs import assert_nothing_left, assert_same_curve, recipe_in
from tests.faults.forked import attempt, start
from tests.faults.save_points import POINTS

pytestmark = pytest.mark.slow

# Before the marker a save counts for nothing; from it on it counts, though the process dies.
_COMPLETE_FROM = "the marker is stored"


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_a_save_loses_no_complete_checkpoint(
    bucket: str,
    dataset: str,
    tmp_path: Path,
    whole_in_bucket: dict[str, Any],
    point: str,
    record_fault: Callable[..., None],
) -> None:
    recipe = recipe_in(bucket, dataset, tmp_path, **{"checkpoint.keep": 1})
    run_dir = prepare_run_dir(recipe, resume=False)
    process = start(attempt, recipe.config.model_dump(mode="json"), recipe.config_hash, run_dir, point, 8)
    process.join(timeout=120)
    assert process.exitcode == -9, "the process did not reach the point"

    reached = 8 if list(POINTS).index(point) >= list(POINTS).index(_COMPLETE_FROM) else 4
    assert complete_checkpoints(run_dir)[-1].step == reached
    started = time.monotonic()
    outcome = run_attempt(recipe, run_dir=run_dir)
    recovery_s = time.monotonic() - started

    assert outcome.step == 12
    assert_same_curve(run_dir, whole_in_bucket)
    first_steps = {}
    for record in read_records(f"{run_dir}/metrics.jsonl"):
        first_steps.setdefault(record["attempt"], record["step"])
    assert list(first_steps.values())[-1] == reached + 1, "it went on from another checkpoint"
    names = storage.list_files(run_dir)
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"step-00000012"}
    assert_nothing_left(tmp_path, run_dir)
    record_fault(
        f"SIGKILL during a save, when {point}", "resumed, same curve bit for bit",
        steps_lost=8 - reached, recovery_s=recovery_s,
    )  # fmt: skip
