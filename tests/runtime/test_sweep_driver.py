"""The driver of a sweep, without a cluster: who holds the directory, how it ends, and what its bookkeeper survives."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydist.cli import sample
from raydist.cli.sampler_choice import explicit_sampler
from raydist.cli.sweep import _sample_command
from raydist.config.sweep import load_sweep
from raydist.core.errors import CapacityError, ConfigError, RaydistError, ResumeError, TrackingError
from raydist.evaluation.sweep_records import TrialRecord
from raydist.runtime import bookkeeper, train_trials
from raydist.runtime import sweep as sweep_module
from raydist.runtime.bookkeeper import Bookkeeper
from raydist.runtime.sample_trials import tracking_of
from raydist.runtime.sweep import SweepOutcome, run_sweep
from raydist.runtime.sweep_runner import SweepRunner
from raydist.runtime.sweep_view import SweepView
from raydist.training import lease
from raydist.training.lease import LEASE, DriverLease
from tests.runtime.sweeps import METRIC, RATE, make_sweep, wait_for, write_sweep
from tests.training.cases import recipe_of


class Handle:
    """Remembers how an MLflow run ended."""

    record = uri = run_id = None

    def __init__(self) -> None:
        self.status = "RUNNING"

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_artifact(self, path: str, *, folder: str = "") -> None: ...

    def finish(self, status: str) -> bool:
        self.status = status
        return True


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Handle:
    """The MLflow run of a sweep that needs no cluster."""
    handle = Handle()
    monkeypatch.setattr(sweep_module, "connected", lambda **_: nullcontext())
    monkeypatch.setattr(sweep_module, "alive_nodes", list)
    monkeypatch.setattr(sweep_module, "require_room", lambda sweep, nodes: None)
    monkeypatch.setattr(sweep_module, "start_sweep_run", lambda folder, **_: handle)
    return handle


@pytest.fixture
def drive(parent: Handle, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SweepOutcome]:
    """Runs a sweep whose trials are run by a function."""
    sweep = make_sweep(tmp_path, dataset, space={RATE: [1e-3, 3e-3]})

    def drive(run: Callable[[SweepRunner], None], *, resume: bool = False, register: str | None = None) -> SweepOutcome:
        monkeypatch.setattr(SweepRunner, "run", run)
        return run_sweep(sweep, resume=resume, view=SweepView(), register=register)

    return drive


def held(folder: Path) -> bool:
    return not json.loads((folder / LEASE).read_text())["ended"]


@pytest.mark.parametrize(
    ("error", "status"), [(SystemExit, "KILLED"), (KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")]
)
def test_a_sweep_holds_its_directory_until_it_ends_and_says_how(
    drive: Any, parent: Handle, tmp_path: Path, error: type[BaseException], status: str
) -> None:
    def run(runner: SweepRunner) -> None:
        assert held(Path(runner.folder.path))
        raise error

    with pytest.raises(error):
        drive(run)
    assert parent.status == status
    assert not held(tmp_path / "out/rates")


def test_a_second_driver_is_refused_while_the_first_one_lives(
    drive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_BEAT_EVERY_S", 0.1)

    def first(runner: SweepRunner) -> None:
        with pytest.raises(ResumeError, match="another driver is running this sweep") as caught:
            drive(lambda _: pytest.fail("two drivers"), resume=True)
        assert "alive" in (caught.value.found or "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(first)


def test_what_ended_while_a_driver_waited_is_not_run_again(
    drive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        drive(interrupt)
    enter = DriverLease.__enter__

    def wait(self: DriverLease) -> DriverLease:
        line = {"index": 0, "name": "rates-000", "parameters": {RATE: 1e-3}, "state": "finished"}
        (tmp_path / "out/rates/trials.jsonl").write_text(json.dumps(line) + "\n")
        return enter(self)

    def second(runner: SweepRunner) -> None:
        assert [record.name for record in runner.records] == ["rates-000"]
        raise KeyboardInterrupt

    monkeypatch.setattr(DriverLease, "__enter__", wait)
    with pytest.raises(KeyboardInterrupt):
        drive(second, resume=True)


def interrupt(runner: SweepRunner) -> None:
    raise KeyboardInterrupt


def finish_one(runner: SweepRunner) -> None:
    entry = runner.folder.begin(0, {RATE: 1e-3})
    Path(runner.folder.trial_dir(0)).mkdir()
    runner._book(runner.folder.note(replace(entry, state="finished", step=8, metrics={METRIC: 2.5})))


def test_a_picture_that_cannot_be_drawn_costs_the_pictures_alone(
    drive: Any, parent: Handle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> list[str]:
        assert (tmp_path / "out/rates/ranking.json").exists(), "the table comes first"
        raise ValueError("no such font")

    monkeypatch.setattr(sweep_module, "write_report", fail)
    outcome = drive(finish_one)
    assert outcome.pictures == []
    assert outcome.best.name == "rates-000"
    assert "no such font" in caplog.text
    assert parent.status == "FINISHED"


def test_a_model_that_cannot_be_registered_leaves_a_whole_sweep(
    drive: Any, parent: Handle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "write_report", lambda *_, **__: [])
    monkeypatch.setattr(sweep_module, "_check_registration", lambda *_: None)

    with pytest.raises(TrackingError):  # the trial is in no MLflow
        drive(finish_one, register="mine")
    (row,) = json.loads((tmp_path / "out/rates/ranking.json").read_text())
    assert (row["trial"], row[METRIC]) == ("rates-000", 2.5)
    assert json.loads((tmp_path / "out/rates/best.json").read_text())["trial"] == "rates-000"
    assert parent.status == "FINISHED"


# --- what is refused before the first trial ---


@pytest.mark.parametrize(("name", "words"), [("my/model", "not a name"), ("mine", "MLflow is off")])
def test_a_model_that_could_not_be_registered_is_refused_before_a_trial_runs(
    drive: Any, tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(RaydistError, match=words) as caught:
        drive(lambda _: pytest.fail("hours of trials"), register=name)
    assert caught.value.where == "--register"
    assert caught.value.fix or caught.value.expected
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("machine_cpus", "scaling", "fits"),
    [
        (2, {"cpus_per_worker": 1000}, False),
        (2, {"cpus_per_worker": 2.5}, False),
        (2, {"num_workers": 4, "cpus_per_worker": 3}, False),
        (2, {"cpus_per_worker": 2}, True),
        (1, {"num_workers": 2}, True),
        (2, {"num_workers": 2, "cpus_per_worker": 2}, True),
        (1, {"num_workers": 4, "cpus_per_worker": 0.5}, True),
    ],
)
def test_the_ray_of_a_sweep_lends_a_worker_no_cpus_that_the_machine_has_not(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    parent: Handle, machine_cpus: int, scaling: dict[str, float], fits: bool,
) -> None:  # fmt: skip
    """More workers than CPUs are lent theirs, as in `raydist train`."""
    recipe = {f"scaling.{key}": value for key, value in scaling.items()}
    sweep = make_sweep(tmp_path, dataset, space={RATE: [1e-3]}, recipe=recipe)
    cpus = []

    def start(*, address: str | None, min_cpus: float) -> Any:
        cpus.append(max(machine_cpus, math.ceil(min_cpus)))  # as `connected` does it
        return nullcontext()

    monkeypatch.setattr(os, "cpu_count", lambda: machine_cpus)
    monkeypatch.setattr(sweep_module, "connected", start)
    monkeypatch.setattr(sweep_module, "alive_nodes", lambda: [{"CPU": float(cpus[-1])}])
    monkeypatch.setattr(sweep_module, "require_room", train_trials.require_room)
    monkeypatch.setattr(SweepRunner, "run", interrupt)
    with pytest.raises(KeyboardInterrupt if fits else CapacityError) as caught:
        run_sweep(sweep, resume=False, view=SweepView())
    if isinstance(caught.value, CapacityError):
        each = scaling["cpus_per_worker"]
        assert caught.value.expected == f"{scaling.get('num_workers', 1)} workers of {each:g} CPU, each on one node"
        assert f"on 1 node ({cpus[-1]} CPU)" in (caught.value.found or "")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["recipe", "space"])
def test_elastic_trials_are_refused(dataset: str, tmp_path: Path, place: str) -> None:
    space: dict[str, Any] = {RATE: [1e-3]}
    if place == "space":
        space["scaling"] = [{"num_workers": 2}, {"num_workers": 2, "min_workers": 1}]
    recipe = {"scaling.num_workers": 2, "scaling.min_workers": 1} if place == "recipe" else {}
    path = write_sweep(tmp_path, dataset, space=space, recipe=recipe)
    with pytest.raises(ConfigError, match="not elastic") as caught:
        train_trials.check_sweep(load_sweep(path))
    assert caught.value.where == "scaling.min_workers"
    if place == "recipe":
        train_trials.check_sweep(load_sweep(path, ["scaling.min_workers=null"]))
        train_trials.check_sweep(load_sweep(path, ["scaling.min_workers=2"]))


# --- sweeps over samplers ---


def sampler_sweep(folder: Path, **overrides: Any) -> Any:
    sweep = {
        "checkpoint": "runs/some",
        "continuation": {"data": "some/held_out"},
        "overrides": {"sampling.sampler": {"name": "autoregressive"}, **overrides},
        "space": {"sampling.sampler.temperature": [0.5, 1.0]},
        "metric": "accuracy",
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return load_sweep(str(folder / "sweep.yaml"))


def test_a_sweep_over_samplers_registers_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no new model") as caught:
        run_sweep(sampler_sweep(tmp_path), resume=False, view=SweepView(), model_dir=str(tmp_path), register="mine")
    assert "raydist export runs/some --register mine" in (caught.value.fix or "")


def test_the_best_of_a_sweep_over_samplers_points_to_the_model_that_was_sampled() -> None:
    """Also after a restart, when the trial has a folder of its own, with its MLflow run alone."""
    best = TrialRecord("s-000", {"sampling.sampler.temperature": 0.5}, "finished", run_dir="runs/s/s-000")
    for record in (best, replace(best, run_dir=None)):
        assert sweep_module._pointer(record, model_dir="runs/some/export") == {
            "trial": "s-000",
            "model": "runs/some/export",
        }


def test_the_command_that_samples_makes_the_trials_sampler(tmp_path: Path) -> None:
    """``--sampler`` leaves out the checkpoint's own settings, so the command names them, and the sampler first."""
    own = {"name": "block", "unmasking": {"name": "entropy_bounded", "gamma": 0.3}}
    (tmp_path / "raydist.json").write_text(json.dumps({"sampling": {"sampler": own}}))
    sweep = sampler_sweep(tmp_path, **{"sampling.sampler": {"block_size": 4}})
    best = {"sampling.sampler.temperature": 0.5}
    words = shlex.split(_sample_command(sweep, best, model_dir=str(tmp_path)))
    assert words[:2] == ["raydist", "sample"]
    parser = argparse.ArgumentParser()
    sample.configure(parser)
    made = explicit_sampler(parser.parse_args(words[2:]))
    assert made == sweep.sampling_of(best, defaults={"sampler": own}).sampler
    assert made.model_dump(mode="json") == {
        **made.model_dump(mode="json"),
        "name": "block",
        "block_size": 4,
        "temperature": 0.5,
    }


def test_a_sweep_over_samplers_is_tracked_as_its_overrides_say(tmp_path: Path) -> None:
    assert tracking_of(sampler_sweep(tmp_path, **{"tracking.experiment": "a"})).experiment == "a"
    nested = {"tracking": {"experiment": "b", "mlflow_uri": "none"}}
    assert (tracking_of(sampler_sweep(tmp_path, **nested)).experiment) == "b"
    both = tracking_of(sampler_sweep(tmp_path, **nested, **{"tracking.experiment": "c"}))
    assert (both.experiment, both.mlflow_uri) == ("c", "none")
    for overrides, key in [
        ({"tracking.experimint": "a"}, "overrides.tracking.experimint"),
        ({"tracking.system_metrics": "often"}, "overrides.tracking.system_metrics"),
    ]:
        with pytest.raises(ConfigError) as caught:
            tracking_of(sampler_sweep(tmp_path, **overrides))
        assert caught.value.where == key


# --- the bookkeeper ---


class Unsendable(Handle):
    """Its storage fails between two trials."""

    record: Any = "mlflow.json"

    def __init__(self) -> None:
        super().__init__()
        self.tries = 0

    def send(self) -> bool:
        self.tries += 1
        raise OSError("no space left on device")


def test_a_finished_trial_stays_finished_whatever_cannot_be_written(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, sweep = Handle(), Unsendable()
    monkeypatch.setattr(bookkeeper, "_SEND_EVERY_S", 0.01)
    monkeypatch.setattr(bookkeeper, "start_run", lambda *_, **__: trial)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "pictures").write_text("no folder can be made here")
    books = Bookkeeper(sweep, sweep="s")  # type: ignore[arg-type]
    wait_for(lambda: sweep.tries > 0)
    time.sleep(0.05)
    books.begin(recipe_of(dataset, tmp_path), str(run_dir))
    books.end("run", str(run_dir), state="finished")
    books.close()
    assert trial.status == "FINISHED"
    assert sweep.tries == 1
