"""A sweep whose driver is killed: nothing that ended is repeated, and the table is that of a sweep that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raydist.checkpoint.layout import newest_complete
from tests.runtime.sweeps import METRIC, write_sweep
from tests.training.cases import quiet_environment, write_dataset

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return write_dataset(tmp_path)


def start(path: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raydist.cli.main", "sweep", path, *words, "--json"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet_environment(),
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trials.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def wait_for(condition: Any, *, timeout_s: float = 240.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def test_kill_the_driver_and_resume(dataset: str, tmp_path: Path) -> None:
    space = {"training.optimizer.learning_rate": [1e-3, 3e-3, 1e-2]}
    path = write_sweep(tmp_path, dataset, space=space, budget={"num_steps": 60})
    whole = finish(start(path, "name=whole"))
    killed = start(path, "name=killed")
    folder = tmp_path / "out" / "killed"

    def in_the_middle() -> bool:
        states = {line["name"]: line["state"] for line in lines(folder)}
        running = [name for name, state in states.items() if state == "running"]
        saved = [name for name in running if newest_complete(str(folder / name)) is not None]
        return "finished" in states.values() and bool(saved)

    wait_for(in_the_middle)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = lines(folder)
    resumed = finish(start(path, "name=killed", "--resume"))
    after = lines(folder)[len(before) :]
    ended = {line["name"] for line in before if line["state"] == "finished"}
    assert ended
    assert not ended & {line["name"] for line in after}, "a finished trial was repeated"
    went_on = [name for name in {line["name"] for line in before} - ended]
    attempts = {
        name: {json.loads(line)["attempt"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()}
        for name in went_on
    }
    assert any(len(numbers) > 1 for numbers in attempts.values()), "no trial went on from its checkpoint"
    assert table(resumed, "killed") == table(whole, "whole")


def table(result: dict[str, Any], name: str) -> list[tuple[str, str, float]]:
    return [
        (trial["name"].removeprefix(name), trial["state"], round(trial["metrics"][METRIC], 9))
        for trial in result["trials"]
    ]
