"""The driver of a submitted job is killed; the run is submitted again."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from raydist.tracking.jsonl import read_records
from tests.faults.harness import assert_nothing_left_over, assert_one_finished_run, loss_curve
from tests.runtime.workplace import WAIT_S, Workplace, workplace
from tests.servers.object_store import ObjectStore
from tests.servers.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NUM_STEPS = 300
CHANGES = {"training.num_steps": NUM_STEPS, "tracking.mlflow_uri": "null"}
WORDS = ("submit", "small.yaml", "name=killed", "--cluster", "cluster.yaml")


def drivers(folder: Path) -> list[psutil.Process]:
    """Processes of `raydist train` whose job works for the run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if "raydist" in words and " train " in words and "/bin/sh" not in words and _works_in(process, folder):
            found.append(process)
    return found


def _works_in(process: psutil.Process, folder: Path) -> bool:
    """The cache of the test's nodes is in the environment of all their processes."""
    try:
        return process.environ().get("XDG_CACHE_HOME") == str(folder / "cache")
    except psutil.Error:
        return False


def status_of(place: Workplace) -> str:
    answer, _ = place.raydist("status", "killed", "--cluster", "cluster.yaml")
    return str(answer["job"]["status"])


def test_the_driver_of_a_job_is_killed_and_the_run_submitted_again(
    tmp_path: Path, object_store: ObjectStore, dataset: str, record_fault: Callable[..., None]
) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    with workplace(tmp_path, object_store, dataset=dataset, **CHANGES) as place:
        place.raydist(*WORDS)
        run = place.folder / "runs" / "killed"
        wait_until(lambda: place.status("killed").step > 60, timeout_s=WAIT_S, what="step 60")
        (driver,) = drivers(tmp_path)
        before = list(read_records(f"{run}/metrics.jsonl"))[-1]
        driver.send_signal(signal.SIGKILL)
        wait_until(lambda: status_of(place) == "FAILED", timeout_s=WAIT_S, what="Ray says that the job failed")

        refused, seen = place.raydist(*WORDS, exit_code=2)
        assert refused["error"] == "ResumeError"
        assert "--resume" in seen
        resumed, _ = place.raydist(*WORDS, "--resume")
        assert resumed["job_id"] == "raydist-killed.job2"
        ended, _ = place.raydist("logs", "killed", "--cluster", "cluster.yaml", "--follow")
        assert ended["status"] == "SUCCEEDED"
        assert drivers(tmp_path) == []

    lines: list[dict[str, Any]] = [line for line in read_records(f"{run}/metrics.jsonl") if "loss" in line]
    first = next(line for line in lines if line["attempt"] == 2)
    curve = loss_curve(str(run))
    assert [step for step, _ in curve] == list(range(1, NUM_STEPS + 1))
    assert_one_finished_run(str(run), uri=uri, curve=curve)
    assert_nothing_left_over(str(run))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    last = max(line["step"] for line in lines if line["attempt"] == 1)
    record_fault(
        "the driver of a submitted job is killed; `submit --resume`",
        "taken over once it is dead",
        steps_lost=last + 1 - first["step"],
        recovery_s=first["time"] - before["time"],
    )
