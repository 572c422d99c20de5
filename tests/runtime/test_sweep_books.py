"""A sweep's driver and what it owes MLflow: what the next one makes good after one that was killed, and whose trials are."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydist.checkpoint.files import FileRecord
from raydist.checkpoint.layout import MARKER, Checkpoint, read_checkpoint, step_folder
from raydist.config.sweep import Sweep, load_sweep
from raydist.core import storage
from raydist.runtime import sweep as sweep_module
from raydist.runtime import trial_worker
from raydist.runtime.bookkeeper import Bookkeeper
from raydist.runtime.sample_trials import SampleTrials, output_dir_of, tracking_of
from raydist.runtime.sweep import SweepOutcome, run_sweep
from raydist.runtime.sweep_dir import SweepDir, open_sweep_dir
from raydist.runtime.sweep_runner import SweepRunner
from raydist.runtime.sweep_view import SweepView
from raydist.runtime.train_trials import TrainTrials
from raydist.tracking import server
from raydist.tracking.artifacts import read_manifest
from raydist.tracking.find import TrackedRun, list_runs
from raydist.tracking.jsonl import JsonlTracker
from raydist.tracking.mlflow_runs import RunHandle
from raydist.tracking.record import RUNNING
from raydist.tracking.run_files import RunFiles
from raydist.tracking.sweep_runs import PARENT_TAG, STATE_TAG, start_sweep_run
from raydist.training.lease import LEASE
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import Outcome
from tests.runtime.sweeps import METRIC, RATE, make_sweep

pytestmark = pytest.mark.usefixtures("mlflow_environment")


def train(run_dir: str) -> None:
    """Leaves what a trained trial leaves: curves, a checkpoint, a model."""
    tracker = JsonlTracker(f"{run_dir}/metrics.jsonl")
    for step in (2, 4):
        tracker.log_metrics({METRIC: 5.0 - step}, step=step)
    tracker.close()
    storage.write_bytes(f"{run_dir}/export/config.json", b"{}\n")
    content, folder = b'{"step": 4}\n', step_folder(run_dir, 4)
    storage.write_bytes(f"{folder}/trainer.json", content)
    digest = hashlib.sha256(content).hexdigest()
    checkpoint = Checkpoint(folder, 4, 1, {"trainer.json": FileRecord(len(content), digest, (digest,))})
    storage.write_json(f"{folder}/{MARKER}", checkpoint.to_json())


def wait_for(books: Bookkeeper) -> None:
    """Until all that was handed in is written."""
    is_idle = threading.Event()
    books._jobs.put(is_idle.set)
    assert is_idle.wait(60.0)


@pytest.fixture
def uri(output_dir: Path) -> str:
    return f"sqlite:///{output_dir}/mlflow.db"


@pytest.fixture
def sweep(dataset: str, tmp_path: Path, uri: str) -> Sweep:
    rates = [1e-3, 3e-3, 1e-2, 3e-2]
    return make_sweep(tmp_path, dataset, space={RATE: rates}, recipe={"tracking.mlflow_uri": uri})


@pytest.fixture
def folder(sweep: Sweep, tmp_path: Path) -> SweepDir:
    return open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=False)


@pytest.fixture
def resume(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sweep], SweepOutcome]:
    """What ``--resume`` does where no trial is left to run."""
    monkeypatch.setattr(sweep_module, "connected", lambda **_: nullcontext())
    monkeypatch.setattr(sweep_module, "alive_nodes", list)
    monkeypatch.setattr(sweep_module, "require_room", lambda sweep, nodes: None)
    monkeypatch.setattr(sweep_module, "write_report", lambda *_, **__: [])
    monkeypatch.setattr(SweepRunner, "run", lambda self: None)
    return lambda sweep: run_sweep(sweep, resume=True, view=SweepView())


def killed_driver(sweep: Sweep, folder: SweepDir) -> None:
    """Four trials end; MLflow has heard all of the first, then only the begin, nothing, and all but the end."""
    assert sweep.recipe is not None
    config = sweep.recipe.config
    parent = start_sweep_run(
        folder.path, name="rates", values={}, tracking=config.tracking, output_dir=config.output_dir
    )
    books = Bookkeeper(parent, sweep="rates")
    kind = TrainTrials(sweep, folder, books)
    for index, parameters in enumerate(sweep.grid()):
        entry = folder.begin(index, parameters)
        run_dir = prepare_run_dir(kind.recipe(index, parameters), resume=False)
        if index != 2:
            kind.prepare(index, parameters)
        train(run_dir)
        entry = folder.note(replace(entry, state="finished", step=4, metrics={METRIC: 1.0}))
        if index in (0, 3):
            kind.ended(folder.record(entry, [METRIC]))
    wait_for(books)
    books._open.clear()
    books.close()
    handle = RunHandle(RunFiles(folder.trial_dir(3)))
    server.connect(str(handle.uri)).update_run(handle.run_id, status=RUNNING)


def runs_of(uri: str) -> dict[str, TrackedRun]:
    runs = list_runs(uri)
    assert len({run.name for run in runs}) == len(runs), "a run is there twice"
    return {run.name: run for run in runs}


def test_a_resume_tells_mlflow_what_a_killed_driver_did_not_come_to(
    sweep: Sweep, folder: SweepDir, uri: str, resume: Callable[[Sweep], SweepOutcome]
) -> None:
    killed_driver(sweep, folder)
    before = runs_of(uri)
    assert {name: run.status for name, run in before.items() if run.status != "FINISHED"} == {
        "rates": "RUNNING",
        "rates-001": "RUNNING",
        "rates-003": "RUNNING",
    }
    assert "rates-002" not in before
    outcome = resume(sweep)
    after = runs_of(uri)
    assert len(after) == 5
    assert {run.status for run in after.values()} == {"FINISHED"}
    assert after["rates-000"] == before["rates-000"], "a complete run is left alone"
    client = server.connect(uri)
    for name in (entry.name for entry in folder.trials):
        run = after[name]
        assert (run.tags[PARENT_TAG], run.tags[STATE_TAG]) == (outcome.parent.run_id, "finished")
        assert [point.step for point in client.get_metric_history(run.run_id, METRIC)] == [2, 4]
        files = {file.name for file in read_manifest(client, run.run_id)}
        place = "checkpoints/step-00000004"
        assert files >= {"model/config.json", "pictures/curves.png", f"{place}/trainer.json", f"{place}/{MARKER}"}
    resume(sweep)
    again = runs_of(uri)
    assert {name: run for name, run in again.items() if name != "rates"} == {
        name: run for name, run in after.items() if name != "rates"
    }


def test_the_best_trials_checkpoint_is_on_disk_as_its_pointer_says(
    dataset: str, tmp_path: Path, resume: Callable[[Sweep], SweepOutcome]
) -> None:
    sweep = make_sweep(tmp_path, dataset, space={RATE: [1e-3]})
    folder = open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=False)
    train(folder.trial_dir(0))
    folder.note(replace(folder.begin(0, sweep.grid()[0]), state="finished", step=4))
    outcome = resume(sweep)
    assert outcome.best is not None
    pointer = json.loads(Path(folder.file("best.json")).read_text())["checkpoint"]
    assert read_checkpoint(pointer["path"]).step == pointer["step"] == 4
    assert pointer["path"].startswith(f"{outcome.best.run_dir}/")
    assert pointer["sha256"] == storage.sha256(f"{pointer['path']}/{MARKER}")
    assert pointer["size"] == sum(storage.size_bytes(file["uri"]) for file in pointer["files"])
    assert all(storage.sha256(file["uri"]) == file["sha256"] for file in pointer["files"])


def test_mlflow_that_is_away_costs_a_resume_nothing(
    sweep: Sweep, folder: SweepDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert sweep.recipe is not None
    config = sweep.recipe.config
    parent = start_sweep_run(
        folder.path, name="rates", values={}, tracking=config.tracking, output_dir=config.output_dir
    )
    folder.note(replace(folder.begin(0, sweep.grid()[0]), state="finished"))
    monkeypatch.setattr(server, "connect", lambda uri: (_ for _ in ()).throw(ConnectionError("no answer")))
    sweep_module._complete_books(sweep, folder, None, parent)  # type: ignore[arg-type]
    assert "no answer" in caplog.text


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_sampled_trial_gets_the_run_that_a_killed_driver_did_not_write(
    tmp_path: Path, uri: str, has_begun: bool
) -> None:
    path = tmp_path / "samplers.yaml"
    overrides = {"tracking.mlflow_uri": uri, "output_dir": str(tmp_path / "out")}
    values = {
        "checkpoint": "runs/some",
        "continuation": {"data": "some/held_out"},
        "overrides": {"sampling.sampler": {"name": "autoregressive"}, **overrides},
        "space": {"sampling.sampler.temperature": [0.5]},
        "metric": "accuracy",
    }
    path.write_text(yaml.safe_dump(values))
    sweep = load_sweep(str(path))
    folder = open_sweep_dir(sweep, output_dir=output_dir_of(sweep), resume=False)
    tracking = tracking_of(sweep)
    parent = start_sweep_run(
        folder.path, name=sweep.name, values={}, tracking=tracking, output_dir=output_dir_of(sweep)
    )
    entry = folder.begin(0, sweep.grid()[0])
    entry = folder.note(replace(entry, state="finished", step=1, metrics={"accuracy": 0.25}))
    for _ in range(2):
        books = Bookkeeper(parent, sweep=sweep.name)
        kind = SampleTrials(sweep, folder, books, "some/export", [])
        if has_begun:
            kind.ended(folder.record(entry, ["accuracy"]))
            wait_for(books)
            server.connect(uri).update_run(runs_of(uri)[entry.name].run_id, status=RUNNING)
        sweep_module._complete_books(sweep, folder, kind, parent)
        books.close()
        run = runs_of(uri)[entry.name]
        assert (run.status, run.tags[PARENT_TAG], run.tags[STATE_TAG]) == ("FINISHED", parent.run_id, "finished")
        history = server.connect(uri).get_metric_history(run.run_id, "accuracy")
        assert [(point.step, point.value) for point in history] == [(1, 0.25)]
    assert len(Path(folder.trial_dir(0), "metrics.jsonl").read_text().splitlines()) == 1


def test_the_workers_of_a_driver_that_lost_its_sweep_write_no_checkpoint(
    sweep: Sweep, folder: SweepDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen driver's; the lease is that of the sweep, not of the trial."""
    answers: list[bool] = []

    def attempt(*_: Any, is_ours: Callable[[], bool], **__: Any) -> Outcome:
        answers.append(is_ours())
        storage.write_json(folder.file(LEASE), {"id": "another", "time": 0.0, "beat": 1, "ended": False})
        answers.append(is_ours())
        return Outcome(step=4, metrics={})

    for name in ("quiet_libraries", "set_up_logging"):
        monkeypatch.setattr(trial_worker, name, lambda: None)
    monkeypatch.setattr(trial_worker, "run_attempt", attempt)
    storage.write_json(folder.file(LEASE), {"id": "ours", "time": 0.0, "beat": 1, "ended": False})
    books = Bookkeeper(RunHandle(RunFiles(folder.path)), sweep="rates")
    trials = TrainTrials(sweep, SweepDir(folder.path, name="rates"), books)
    config = trials.prepare(0, sweep.grid()[0])
    books.close()
    trial_worker.trial_worker({**config, "name": "rates-000", "board": None})
    assert answers == [True, False]
