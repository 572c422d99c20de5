"""The driver's side of a sweep's trials, without a cluster: what is proposed when, and what is known of each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydist.config.sweep import Sweep
from raydist.evaluation.sweep_records import TrialRecord
from raydist.runtime import trial_train
from raydist.runtime.cluster import RAY_ENVIRONMENT
from raydist.runtime.sweep_dir import SweepDir, open_sweep_dir
from raydist.runtime.sweep_runner import SweepRunner
from raydist.runtime.trial_train import TrainingThread
from raydist.runtime.tune import Pause
from tests.runtime.sweeps import METRIC, RATE, Watcher, make_sweep
from tests.training.cases import recipe_of

FINISHED = {"trial_state": "finished", "step": 8}


class Halves:
    """Trials that take half of the cluster each, and only remember that they ended."""

    trainable: Any = None

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self.ended_trials: list[str] = []

    def check(self, parameters: Mapping[str, Any]) -> None:
        self._sweep.resolve_trial(parameters)

    def rebook(self, index: int, record: TrialRecord) -> None:
        raise AssertionError("a runner books only what ends while it runs")

    def share(self, parameters: Mapping[str, Any], nodes: Sequence[Mapping[str, float]]) -> float:
        return 0.5

    def resources(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def prepare(self, index: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def ended(self, record: TrialRecord) -> None:
        self.ended_trials.append(record.name)


class Script:
    """Proposes what it is given, and remembers what it was told before each question."""

    def __init__(self, *trials: dict[str, Any]) -> None:
        self._trials = list(enumerate(trials))
        self.told: list[int] = []
        self.told_before: list[list[int]] = []

    def next(self) -> tuple[int, dict[str, Any]] | None:
        self.told_before.append(list(self.told))
        return self._trials.pop(0) if self._trials else None

    def tell(self, index: int, record: TrialRecord) -> None:
        self.told.append(index)


@pytest.fixture
def sweep(dataset: str, tmp_path: Path) -> Sweep:
    return make_sweep(tmp_path, dataset, space={RATE: [1e-3, 3e-3, 1e-2, 3e-2]})


@pytest.fixture
def folder(sweep: Sweep, tmp_path: Path) -> SweepDir:
    return open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=False)


def runner_of(sweep: Sweep, folder: SweepDir) -> SweepRunner:
    return SweepRunner(sweep, folder=folder, kind=Halves(sweep), view=Watcher())


def states(runner: SweepRunner) -> dict[str, str]:
    return {record.name: record.state for record in runner.records}


def test_a_searcher_is_asked_once_there_is_room_and_it_knows_what_made_it(sweep: Sweep, folder: SweepDir) -> None:
    runner = runner_of(sweep, folder)
    runner._proposals = script = Script(*sweep.grid())
    for _ in range(2):
        assert isinstance(runner.propose(), dict)
    assert [runner.propose() for _ in range(3)] == [Pause.FOR_ROOM] * 3
    runner.ended("rates-001", FINISHED)
    assert isinstance(runner.propose(), dict)
    assert script.told_before == [[], [], [1]]


def test_where_trials_differ_in_size_a_small_one_takes_what_is_left(dataset: str, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, dataset, space={"scaling.cpus_per_worker": [4, 1, 2]})
    runner = runner_of(sweep, open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=False))
    runner.kind.share = lambda parameters, nodes: parameters["scaling.cpus_per_worker"] / 5  # type: ignore[method-assign]
    assert isinstance(runner.propose(), dict)
    assert isinstance(runner.propose(), dict)
    assert runner.propose() is Pause.FOR_ROOM


def test_what_a_searcher_proposes_and_no_recipe_takes_is_a_failed_trial(sweep: Sweep, folder: SweepDir) -> None:
    runner = runner_of(sweep, folder)
    good, bad = {RATE: 1e-3}, {RATE: -1.0}
    runner._proposals = script = Script(bad, good, bad)
    proposal = runner.propose()
    assert isinstance(proposal, dict)
    assert proposal["name"] == "rates-001"
    assert states(runner) == {"rates-000": "failed", "rates-001": "running"}
    runner.ended("rates-001", FINISHED)
    assert runner.propose() is Pause.FOR_GOOD
    assert states(runner) == {"rates-000": "failed", "rates-001": "finished", "rates-002": "failed"}
    assert script.told == [0, 1, 2]
    assert runner.kind.ended_trials == ["rates-000", "rates-001", "rates-002"]  # type: ignore[attr-defined]
    assert all(f"space.{RATE}" in folder.trials[index].failure for index in (0, 2))
    assert not runner.has_more


def test_after_a_restart_trials_of_before_are_known_until_they_begin_again(sweep: Sweep, folder: SweepDir) -> None:
    rates = [trial[RATE] for trial in sweep.grid()]
    for index, state in enumerate(("finished", "failed", "running", "waiting")):
        entry = folder.begin(index, {RATE: rates[index]})
        folder.note(replace(entry, state=state, step=4, metrics={METRIC: 2.5}))  # type: ignore[arg-type]
    runner = runner_of(sweep, SweepDir(folder.path, name="rates"))
    before = {"rates-000": "finished", "rates-001": "failed", "rates-002": "waiting", "rates-003": "waiting"}
    assert states(runner) == before
    assert runner.has_more
    for name in ("rates-001", "rates-002"):
        proposal = runner.propose()
        assert isinstance(proposal, dict)
        assert proposal["name"] == name
    assert states(runner) == before | {"rates-001": "running", "rates-002": "running"}
    for name in ("rates-001", "rates-002"):
        runner.ended(name, FINISHED)
    assert isinstance(runner.propose(), dict)
    runner.ended("rates-003", FINISHED)
    assert states(runner) == dict.fromkeys(before, "finished")
    assert not runner.has_more


def test_trials_have_the_users_own_ray_settings(
    sweep: Sweep, folder: SweepDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "77")
    monkeypatch.delenv("RAY_DEDUP_LOGS", raising=False)
    proposal = runner_of(sweep, folder).propose()
    assert isinstance(proposal, dict)
    sent = proposal["environment"]
    assert set(sent) == set(RAY_ENVIRONMENT)
    assert sent["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "77"
    assert sent["RAY_DEDUP_LOGS"] == RAY_ENVIRONMENT["RAY_DEDUP_LOGS"]


def test_a_trials_workers_may_be_silent_as_long_as_its_collectives(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
    monkeypatch.setenv(key, "1")
    seen: list[str] = []

    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> Any:
            seen.append(os.environ[key])
            return SimpleNamespace(return_value={"stopped": False})

    monkeypatch.setattr(trial_train, "InProcessTrainer", Trainer)
    scaling = recipe_of(dataset, tmp_path).config.scaling.model_copy(update={"collective_timeout_s": 123.0})
    ends: list[Mapping[str, Any]] = []
    thread = TrainingThread({"run_dir": str(tmp_path)}, scaling=scaling, spare=None, on_end=ends.append)
    assert thread.join(timeout_s=60.0)
    assert ends == [{"stopped": False}]
    assert seen == ["123.0"]
