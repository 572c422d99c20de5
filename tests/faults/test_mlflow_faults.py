"""A real MLflow server goes away at every stage of a real run: training goes on, there is one MLflow run, no step in it
twice, and nothing is lost.

Training happens in this process, so that a fault falls on an exact step; no test would end if a step waited for the server,
since the server comes back only at a later step or after the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from raydist.checkpoint.layout import newest_complete
from raydist.cli.main import main
from raydist.config.load import Recipe
from raydist.tracking import jsonl, server
from raydist.tracking.artifacts import list_artifacts
from raydist.tracking.find import TrackedRun, find_run, list_runs
from raydist.tracking.points import attempts_of, points_of_file, points_of_run
from raydist.tracking.record import RunRecord
from raydist.training.driver import conduct
from raydist.training.hooks import Hook
from raydist.training.session import Outcome, run_attempt
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.mlflow_server import MlflowServer
from tests.tracking.helpers import history
from tests.training.cases import quiet_environment, recipe_of, recipe_values

pytestmark = [pytest.mark.slow, pytest.mark.mlflow_server, pytest.mark.usefixtures("mlflow_environment")]

NUM_STEPS = 12
Action = Callable[[], None]


@pytest.fixture
def mlflow(mlflow_server: MlflowServer) -> Iterator[MlflowServer]:
    """The session's server, which runs again when the test has ended."""
    yield mlflow_server
    if mlflow_server.is_running:
        mlflow_server.resume()
    else:
        mlflow_server.start()


class At(Hook):
    """Does something when a step has been logged."""

    def __init__(self, actions: Mapping[int, Action]) -> None:
        self.actions = actions
        self.steps: list[int] = []

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)
        self.actions.get(step, lambda: None)()


def recipe_on(uri: str, dataset: str, output_dir: Path, **changes: object) -> Recipe:
    short = {"training.num_steps": NUM_STEPS, "checkpoint.every_steps": 5, "training.validate_every_steps": 6}
    return recipe_of(dataset, output_dir, **{**short, "tracking.mlflow_uri": uri, **changes})


def train(recipe: Recipe, actions: Mapping[int, Action]) -> tuple[str, RunRecord]:
    """Trains to the end; returns the run directory and the record of the MLflow run."""
    hook = At(actions)

    def attempts(recipe: Recipe, run_dir: str) -> Outcome:
        return run_attempt(recipe, run_dir=run_dir, hooks=[hook])

    run_dir, handle, outcome = conduct(recipe, resume=False, attempts=attempts)
    assert (outcome.step, hook.steps) == (NUM_STEPS, list(range(1, NUM_STEPS + 1)))
    assert handle.record is not None
    return run_dir, handle.record


def wait_for_step(uri: str, run_name: str, step: int) -> None:
    """Until MLflow has the run up to a step, so that a fault falls between what was sent and what was not."""
    deadline = time.monotonic() + 120
    while not any(r.name == run_name and (r.last_step or 0) >= step for r in list_runs(uri)):
        assert time.monotonic() < deadline, f"step {step} did not reach MLflow"
        time.sleep(0.1)


def sync(run_dir: str, capsys: pytest.CaptureFixture[str]) -> float:
    """`raydist runs sync`, as a user types it; returns the seconds it took."""
    started_s = time.monotonic()
    capsys.readouterr()
    assert main(["runs", "sync", run_dir, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == NUM_STEPS
    return time.monotonic() - started_s


def require_whole(run_dir: str, record: RunRecord) -> TrackedRun:
    """One run with the right end, every curve of the run directory once, and what the run made."""
    mine = [run for run in list_runs(record.uri) if run.tags["raydist.run_dir"] == run_dir]
    assert len(mine) == 1
    run = find_run(run_dir)
    assert run.run_id == mine[0].run_id
    assert (run.status, run.start_time_ms, run.end_time_ms) == ("FINISHED", record.start_time_ms, record.end_time_ms)
    curves = jsonl.read_curve(f"{run_dir}/metrics.jsonl")
    assert [step for step, _ in curves["loss"]] == list(range(1, NUM_STEPS + 1))
    assert set(run.metrics) == set(curves)
    for key, curve in curves.items():
        assert history(run.uri, run.run_id, key) == curve
    assert points_of_run(run) == points_of_file(f"{run_dir}/metrics.jsonl")
    assert run.params["training.num_steps"] == str(NUM_STEPS)
    entries = {entry.name: entry for entry in list_artifacts(run)}
    newest = newest_complete(run_dir)
    assert newest is not None
    for name, file in newest.files.items():
        entry = entries[f"checkpoints/step-{NUM_STEPS:08d}/{name}"]
        assert (entry.size, entry.sha256, entry.uri) == (file.size_bytes, file.sha256, f"{newest.folder}/{name}")
    names = set(entries)
    assert {"config.yaml", "metrics.jsonl", "model/model.safetensors", "pictures/curves.png"} <= names
    return run


@pytest.fixture
def survives(capsys: pytest.CaptureFixture[str], record_fault: Callable[..., None]) -> Callable[..., str]:
    """Trains with faults, ends them, syncs, and requires that nothing is missing; returns the run directory."""

    def check(
        recipe: Recipe, actions: Mapping[int, Action], *, fault: str, outcome: str, mend: Action = lambda: None
    ) -> str:
        run_dir, record = train(recipe, actions)
        mend()
        seconds = sync(run_dir, capsys)
        require_whole(run_dir, record)
        record_fault(fault, outcome, steps_lost=0, recovery_s=seconds)
        return run_dir

    return check


def test_down_when_the_run_starts(
    dataset: str, tmp_path: Path, mlflow: MlflowServer, survives: Callable[..., str]
) -> None:
    mlflow.kill()
    recipe = recipe_on(mlflow.url, dataset, tmp_path, name="down-at-start")
    outcome = "trained on; run made later, start time kept"
    run_dir = survives(recipe, {6: mlflow.start}, fault="MLflow down at the start", outcome=outcome)
    first_s = next(iter(jsonl.read_records(f"{run_dir}/metrics.jsonl")))["time"]
    started_ms = find_run(run_dir).start_time_ms
    assert started_ms is not None
    assert started_ms <= 1000 * first_s, "the run began when training began, not when the server was back"


def test_killed_in_the_middle(dataset: str, tmp_path: Path, mlflow: MlflowServer, survives: Callable[..., str]) -> None:
    def kill() -> None:
        wait_for_step(mlflow.url, "down-in-the-middle", 2)
        mlflow.kill()

    recipe = recipe_on(mlflow.url, dataset, tmp_path, name="down-in-the-middle")
    outcome = "trained on; replayed, no step twice"
    survives(recipe, {4: kill, 8: mlflow.start}, fault="MLflow killed in the middle", outcome=outcome)


def test_restarted_in_the_middle(
    dataset: str, tmp_path: Path, mlflow: MlflowServer, survives: Callable[..., str]
) -> None:
    def restart() -> None:
        wait_for_step(mlflow.url, "restarted", 2)
        mlflow.stop()
        mlflow.start()

    recipe = recipe_on(mlflow.url, dataset, tmp_path, name="restarted")
    survives(recipe, {4: restart}, fault="MLflow server restarted", outcome="trained on; replayed, no step twice")


def test_down_when_the_run_ends(
    dataset: str, tmp_path: Path, mlflow: MlflowServer, survives: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    def mend() -> None:
        assert main(["runs", "sync", os.fspath(tmp_path / "down-at-end")]) == 2
        assert "MLflow cannot be reached" in capsys.readouterr().err
        mlflow.start()
        assert find_run(os.fspath(tmp_path / "down-at-end")).status == "RUNNING"

    recipe = recipe_on(mlflow.url, dataset, tmp_path, name="down-at-end")
    outcome = "`raydist runs sync` finished it"
    survives(recipe, {NUM_STEPS - 1: mlflow.kill}, fault="MLflow down at the end", outcome=outcome, mend=mend)


def test_frozen(dataset: str, tmp_path: Path, mlflow: MlflowServer, survives: Callable[..., str]) -> None:
    def freeze() -> None:
        wait_for_step(mlflow.url, "frozen", 2)
        mlflow.pause()

    recipe = recipe_on(mlflow.url, dataset, tmp_path, name="frozen")
    outcome = "trained to the end; replayed"
    survives(recipe, {4: freeze}, fault="MLflow frozen (SIGSTOP)", outcome=outcome, mend=mlflow.resume)


def test_slow_and_failing_at_random(
    dataset: str, tmp_path: Path, mlflow: MlflowServer, survives: Callable[..., str]
) -> None:
    """Slow from the first request on, then half of the requests are answered with 503."""
    with FaultyProxy(mlflow.url, seed=1) as proxy:
        proxy.slow(delay_s=0.5)
        fail = {6: lambda: proxy.errors(rate=0.5, status=503)}
        recipe = recipe_on(proxy.endpoint, dataset, tmp_path, name="slow")
        fault = "MLflow slow, then half of it 503"
        survives(recipe, fail, fault=fault, outcome="trained on; replayed", mend=proxy.pass_all)
        assert 503 in {exchange.status for exchange in proxy.exchanges}


def test_a_killed_driver_while_mlflow_is_away(
    dataset: str, tmp_path: Path, mlflow: MlflowServer, record_fault: Action
) -> None:
    """SIGKILL in the middle of an outage, then a resume: one run of two attempts, and the repeated steps once."""
    num_steps = 150
    changes = {"training.num_steps": num_steps, "checkpoint.every_steps": 20, "name": "killed-driver"}
    values = recipe_values(dataset, tmp_path, **{**changes, "tracking.mlflow_uri": mlflow.url})
    path, run_dir = tmp_path / "recipe.yaml", tmp_path / "killed-driver"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "raydist.cli.main", "train", str(path), "--no-ray"]

    mlflow.kill()
    with subprocess.Popen(command, env=quiet_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as first:
        metrics = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 180
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 50:
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    mlflow.start()
    started_s = time.monotonic()
    second = subprocess.run(
        [*command, "--resume"], env=quiet_environment(), capture_output=True, text=True, check=False
    )
    assert second.returncode == 0, second.stderr

    mine = [run for run in list_runs(mlflow.url) if run.tags["raydist.run_dir"] == os.fspath(run_dir)]
    assert [run.status for run in mine] == ["FINISHED"]
    records = list(jsonl.read_records(str(metrics)))
    resumed = next(record for record in records if record["attempt"] == 2)
    assert [(a.number, a.first_step) for a in attempts_of(mine[0].tags)] == [(1, 1), (2, resumed["step"])]
    assert [step for step, _ in history(mlflow.url, mine[0].run_id, "loss")] == list(range(1, num_steps + 1))
    loss = [point for point in points_of_run(mine[0]) if point.metric == "loss"]
    assert [point.step for point in loss] == list(range(1, num_steps + 1))
    assert [point.attempt for point in loss] == [1 if point.step < resumed["step"] else 2 for point in loss]
    recorded = server.connect(mlflow.url).get_run(mine[0].run_id).info.start_time
    assert recorded <= 1000 * records[0]["time"]
    reached = max(record["step"] for record in records if record["attempt"] == 1)
    record_fault(
        "driver SIGKILL while MLflow is down",
        "--resume: one MLflow run, two attempts, no step twice",
        steps_lost=reached + 1 - resumed["step"],
        recovery_s=time.monotonic() - started_s,
    )
