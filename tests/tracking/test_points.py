"""Exported curves have each step once, and nothing that a restart rolled back."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from raydist.cli.main import main
from raydist.tracking import jsonl
from raydist.tracking.find import find_run
from raydist.tracking.mlflow_runs import RunHandle, start_run, sync_run
from raydist.tracking.points import Attempt, Point, attempt_tags, attempts_of, points_of_run, write_csv
from tests.tracking.helpers import history, make_config


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that records carry; the last entry is now."""
    now = [1_767_225_600.0]
    monkeypatch.setattr(jsonl.time, "time", lambda: now[-1])
    return now


def attempt(run_dir: Path, output_dir: Path, steps: range, clock: list[float]) -> RunHandle:
    handle = start_run(make_config(output_dir), run_dir=str(run_dir))
    tracker = jsonl.JsonlTracker(str(run_dir / jsonl.FILE_NAME))
    for step in steps:
        clock.append(clock[-1] + 1)
        tracker.log_metrics({"loss": 100.0 * tracker.attempt + step}, step=step)
    tracker.close()
    sync_run(str(run_dir))
    return handle


def loss_of(run_dir: Path) -> list[tuple[int, int]]:
    """``(step, attempt)`` of the exported loss."""
    return [(p.step, p.attempt) for p in points_of_run(find_run(str(run_dir))) if p.metric == "loss"]


def test_what_was_rolled_back_is_hidden_while_the_run_goes_on_and_after(output_dir: Path, clock: list[float]) -> None:
    run_dir = output_dir / "small"
    attempt(run_dir, output_dir, range(1, 11), clock)
    assert loss_of(run_dir) == [(step, 1) for step in range(1, 11)]
    attempt(run_dir, output_dir, range(6, 9), clock)  # repeats steps, which MLflow gets only once
    run = find_run(str(run_dir))
    assert [step for step, _ in history(run.uri, run.run_id, "loss")] == list(range(1, 11))
    assert loss_of(run_dir) == [(step, 1) for step in range(1, 6)], "9 and 10 are no part of this history"
    handle = attempt(run_dir, output_dir, range(8, 13), clock)
    assert loss_of(run_dir) == [(step, 1) for step in range(1, 11)] + [(11, 3), (12, 3)]

    handle.finish("KILLED")
    assert loss_of(run_dir) == [*((s, 1) for s in range(1, 6)), (6, 2), (7, 2), *((s, 3) for s in range(8, 13))]
    assert [(a.number, a.first_step) for a in attempts_of(find_run(str(run_dir)).tags)] == [(1, 1), (2, 6), (3, 8)]


def test_tags_come_back_and_damaged_ones_are_passed_over() -> None:
    tags = attempt_tags(2, first_step=6, start_time_ms=1000) | attempt_tags(1, first_step=1, start_time_ms=10)
    assert attempts_of(tags) == [Attempt(1, 1, 10), Attempt(2, 6, 1000)]
    assert attempts_of({**tags, "raydist.attempt.2.first_step": "six", "raydist.attempt": "2"}) == [Attempt(1, 1, 10)]


def test_the_table_reads_back_exactly(tmp_path: Path) -> None:
    points = [Point("a,b", 1, 0.1, 1), Point("loss", 2, 1e-300, 1), Point("loss", 3, math.inf, 2)]
    write_csv(points, path=str(tmp_path / "curves.csv"))
    with open(tmp_path / "curves.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [Point(r["metric"], int(r["step"]), float(r["value"]), int(r["attempt"])) for r in rows] == points


def test_the_verb(output_dir: Path, clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(output_dir / "small", output_dir, range(1, 4), clock)
    attempt(output_dir / "small", output_dir, range(3, 6), clock).finish("FINISHED")
    where = ["runs", "curves", "small", "--output-dir", str(output_dir), "--to", str(tmp_path / "c.csv"), "--json"]
    assert main([*where, "--metric", "loss"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["num_points"], result["metrics"], result["num_attempts"]) == (5, ["loss"], 2)
    lines = (tmp_path / "c.csv").read_text().splitlines()
    expected = ["101.0,1", "102.0,1", "203.0,2", "204.0,2", "205.0,2"]
    assert lines == [
        "metric,step,value,attempt",
        *(f"loss,{step},{rest}" for step, rest in enumerate(expected, start=1)),
    ]
    assert main([*where, "--metric", "los"]) == 2
