"""A sweep whose driver or node is killed: nothing that ended is repeated, and the table is that of a sweep left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from raydist.tracking import server
from raydist.tracking.find import list_runs
from raydist.tracking.jsonl import read_curve
from raydist.tracking.sweep_runs import PARENT_TAG, STATE_TAG
from tests.faults.ray_nodes import RayNodes
from tests.runtime.sweeps import METRIC, RATE, attempts, is_in_the_middle, lines, saved, wait_for, write_sweep
from tests.training.cases import quiet_environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Table = list[tuple[str, str, float]]
SWEEP: dict[str, Any] = {
    "space": {RATE: [1e-3, 3e-3, 1e-2]},
    "budget": {"num_steps": 200},
    "overrides": {"training.validate_every_steps": 10, "checkpoint.every_steps": 10},
}


def start(path: str, *words: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raydist.cli.main", "sweep", path, *words, "--json"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**quiet_environment(), **(environment or {})},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def table(result: Mapping[str, Any], name: str) -> Table:
    return [
        (trial["name"].removeprefix(name), trial["state"], round(trial["metrics"][METRIC], 9))
        for trial in result["trials"]
    ]


def assert_mlflow_is_whole(result: Mapping[str, Any], folder: Path) -> None:
    """One run for the sweep and one for each trial, all ended, each step once."""
    runs = {run.name: run for run in list_runs(result["mlflow_uri"])}
    names = [trial["name"] for trial in result["trials"]]
    assert len(list_runs(result["mlflow_uri"])) == len(runs) == 1 + len(names)
    assert {run.status for run in runs.values()} == {"FINISHED"}
    client = server.connect(result["mlflow_uri"])
    for name in names:
        tags = runs[name].tags
        assert (tags[PARENT_TAG], tags[STATE_TAG]) == (result["mlflow_run_id"], "finished")
        curves = read_curve(str(folder / name / "metrics.jsonl"))
        for metric in (METRIC, "loss"):
            history = client.get_metric_history(runs[name].run_id, metric)
            assert [point.step for point in history] == [step for step, _ in curves[metric]], (name, metric)
        files = {item.path for item in client.list_artifacts(runs[name].run_id)}
        assert {"model", "pictures"} <= files


@pytest.fixture(scope="module")
def whole(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """The table of the sweep, left alone."""
    path = write_sweep(tmp_path_factory.mktemp("whole"), dataset, **SWEEP)
    return table(finish(start(path, "name=whole")), "whole")


def test_kill_the_driver_and_resume(
    dataset: str, whole: Table, tmp_path: Path, record_fault: Callable[..., None]
) -> None:
    """The driver keeps an MLflow of its own, and dies somewhere between a trial's end and what it has to say of it."""
    path = write_sweep(tmp_path, dataset, **SWEEP, recipe={"tracking.mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db"})
    killed = start(path, "name=killed")
    folder = tmp_path / "out" / "killed"
    wait_for(lambda: is_in_the_middle(folder) or killed.poll() is not None)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = lines(folder)
    resumed = finish(start(path, "name=killed", "--resume"))
    after = lines(folder)[len(before) :]
    ended = {line["name"] for line in before if line["state"] == "finished"}
    assert ended
    assert not ended & {line["name"] for line in after}, "a finished trial was repeated"
    went_on = [name for name in {line["name"] for line in before} - ended]
    assert any(len(attempts(folder, name)) > 1 for name in went_on), "no trial went on from its checkpoint"
    assert table(resumed, "killed") == whole
    assert_mlflow_is_whole(resumed, folder)
    record_fault(
        "kill -9 of a sweep's driver, then --resume",
        "finished trials kept, running ones went on; same table, one MLflow run each",
        steps_lost=None,
        recovery_s=None,
    )


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[RayNodes]:
    cluster = RayNodes(tmp_path)
    yield cluster
    cluster.stop()


def test_a_node_dies_and_the_sweep_goes_on_without_it(
    dataset: str, whole: Table, nodes: RayNodes, tmp_path: Path, record_fault: Callable[..., None]
) -> None:
    """Two nodes of one CPU, a trial on each; when both trials have a checkpoint, a node is switched off."""
    for _ in range(2):
        nodes.add_node()
    nodes.wait_for_cpus(2)
    path = write_sweep(tmp_path, dataset, **SWEEP)
    folder = tmp_path / "out" / "lost"
    sweep = start(path, "name=lost", "--address", nodes.address, environment=nodes.environment())
    wait_for(lambda: len(saved(folder)) == 2 or sweep.poll() is not None)
    victim = next(node for node in nodes.nodes if node.train_workers())
    victim.kill()
    before = lines(folder)
    result = finish(sweep)
    assert table(result, "lost") == whole
    ended = {line["name"] for line in before if line["state"] == "finished"}
    assert not ended & {line["name"] for line in lines(folder)[len(before) :]}, "a finished trial was repeated"
    assert not [line for line in lines(folder) if line["failure"]]
    hit = [name for name in {line["name"] for line in before} - ended if len(attempts(folder, name)) > 1]
    assert hit, "no trial was hit"
    assert nodes.placement_groups() == 0
    assert nodes.train_processes() == []
    record_fault("a node of a sweep dies", "its trial goes on elsewhere; same table", steps_lost=None, recovery_s=None)
