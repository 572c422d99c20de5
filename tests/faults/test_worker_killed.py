"""SIGKILL of a worker in the middle of a real run on Ray, tracked in MLflow."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from raydist.config.load import Recipe
from raydist.runtime.trainer import train_on_ray
from raydist.tracking import server
from raydist.tracking.find import list_runs
from raydist.tracking.jsonl import read_curve, read_records
from raydist.training.driver import conduct
from raydist.training.hooks import Hook, RunFacts
from raydist.training.session import Outcome
from tests.training.cases import recipe_of, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.ray]


class KillAWorkerOnce(Hook):
    """SIGKILL to one of the Ray Train workers when the run has logged a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.killed: list[int] = []
        self.starts: list[int] = []

    def on_start(self, facts: RunFacts) -> None:
        self.starts.append(facts.start_step)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= self.step and not self.killed:
            self.killed.append(train_workers()[-1])
            os.kill(self.killed[0], signal.SIGKILL)


def train_workers() -> list[int]:
    """Process ids of the Ray Train workers below this process."""
    children = psutil.Process().children(recursive=True)
    return sorted(child.pid for child in children if "RayTrainWorker" in " ".join(child.cmdline()))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def a_run(recipe: Recipe, *hooks: Hook, resume: bool = False) -> tuple[str, str | None]:
    def attempts(recipe: Recipe, run_dir: str) -> Outcome:
        return train_on_ray(recipe, run_dir=run_dir, hooks=hooks)

    run_dir, handle, _ = conduct(recipe, resume=resume, attempts=attempts)
    return run_dir, handle.uri


def test_the_run_goes_on_as_if_nothing_had_happened(ray_cluster: None, dataset: str, tmp_path: Path) -> None:
    changes = {
        "scaling.num_workers": 2,
        "training.num_steps": 200,
        "training.validate_every_steps": "null",
        "checkpoint.every_steps": 20,
        "tracking.mlflow_uri": "null",
    }
    whole_dir, _ = a_run(recipe_of(dataset, tmp_path / "whole", **changes))
    killer = KillAWorkerOnce(step=50)
    run_dir, uri = a_run(recipe_of(dataset, tmp_path / "killed", **changes), killer)

    assert killer.killed, "no worker was found to kill"
    assert not psutil.pid_exists(killer.killed[0])
    assert len(killer.starts) == 2
    assert killer.starts[0] == 0
    assert killer.starts[1] % 20 == 0
    assert killer.starts[1] >= 20
    attempts = {record["attempt"] for record in read_records(f"{run_dir}/metrics.jsonl")}
    assert len(attempts) == 2

    curve, whole = (read_curve(f"{folder}/metrics.jsonl")["loss"] for folder in (run_dir, whole_dir))
    assert [step for step, _ in curve] == list(range(1, 201))
    assert curve == whole  # bit for bit

    assert uri is not None
    runs = list_runs(uri, experiment="raydist")
    assert [run.name for run in runs] == ["run"]
    assert runs[0].status == "FINISHED"
    history = server.connect(uri).get_metric_history(runs[0].run_id, "loss")
    assert [point.step for point in history] == list(range(1, 201)), "a step is in MLflow twice, or missing"
    assert [point.value for point in history] == [value for _, value in whole]
