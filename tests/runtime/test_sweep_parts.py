"""The parts of a sweep that need no cluster: the board, the directory, proposals, early stopping, capacity."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydist.config.schema import ScalingConfig
from raydist.config.sweep_fairness import MetricConfig
from raydist.config.sweep_schema import SchedulerConfig
from raydist.core.errors import CapacityError, ResumeError
from raydist.evaluation.sweep_records import TrialRecord
from raydist.runtime.bookkeeper import Bookkeeper
from raydist.runtime.early_stopping import catch_up, make_scheduler
from raydist.runtime.proposals import make_proposals
from raydist.runtime.sweep_capacity import require_slots, worker_slots
from raydist.runtime.sweep_dir import TRIALS, SweepDir, TrialEntry, open_sweep_dir
from raydist.runtime.sweep_runner import SweepRunner
from raydist.runtime.sweep_view import SweepView
from raydist.runtime.trial_board import TrialBoard
from raydist.tracking import server
from raydist.tracking.find import list_runs
from raydist.tracking.sweep_runs import PARENT_TAG, start_sweep_run
from tests.runtime.sweeps import METRIC, RATE, make_sweep

TWO_RATES = {RATE: [1e-3, 3e-3]}


def record(name: str, *values: float, state: Any = "finished") -> TrialRecord:
    curve = [(2 * step, value) for step, value in enumerate(values, start=1)]
    return TrialRecord(name, {}, state, {METRIC: curve}, num_steps=2 * len(values))


# --- the board ---


def test_a_worker_waits_for_the_verdict_and_asking_for_more_lets_it_go_on() -> None:
    async def scene() -> None:
        board = TrialBoard()
        await board.begin("a")
        worker = asyncio.create_task(board.report("a", 2, {"x": 1.0}, False))
        assert await board.next_event("a") == ("report", {"step": 2, "metrics": {"x": 1.0}, "is_last": False})
        await asyncio.sleep(0)
        assert not worker.done()
        waiting = asyncio.create_task(board.next_event("a"))
        assert await worker is False
        again = await board.report("a", 2, {"x": 1.0}, False)
        assert again is False, "a restarted worker that reaches a decided step must not wait"
        await board.end("a", {"stopped": False})
        assert await waiting == ("end", {"stopped": False})

    asyncio.run(scene())


def test_a_stopped_trial_hears_it_at_the_step_where_it_waits_and_ever_after() -> None:
    async def scene() -> None:
        board = TrialBoard()
        await board.begin("a")
        worker = asyncio.create_task(board.report("a", 2, {}, False))
        await board.next_event("a")
        await board.stop("a")
        assert await worker is True
        assert await board.report("a", 4, {}, False) is True
        assert await board.report("a", 6, {}, True) is False, "nobody throws a finished trial away"

    asyncio.run(scene())


def test_a_worker_that_reports_again_while_the_first_report_waits_makes_no_second_event() -> None:
    async def scene() -> None:
        board = TrialBoard()
        await board.begin("a")
        first = asyncio.create_task(board.report("a", 2, {}, False))
        await asyncio.sleep(0)
        second = asyncio.create_task(board.report("a", 2, {}, False))
        await board.next_event("a")
        await board.stop("a")
        assert [await first, await second] == [True, True]
        await board.end("a", {})
        assert (await board.next_event("a"))[0] == "end"

    asyncio.run(scene())


# --- the directory ---


@pytest.mark.parametrize(
    ("exists", "same", "resume", "message"),
    [
        (False, True, False, None),
        (False, True, True, "no such sweep to resume"),
        (True, True, False, "name is in use"),
        (True, True, True, None),
        (True, False, True, "differs from the one"),
    ],
)
def test_who_may_use_a_name(
    dataset: str, tmp_path: Path, exists: bool, same: bool, resume: bool, message: str | None
) -> None:
    sweep = make_sweep(tmp_path, dataset, space=TWO_RATES)
    if exists:
        before = sweep if same else replace(sweep, sha256="0" * 64)
        open_sweep_dir(before, output_dir=str(tmp_path / "out"), resume=False)
    if message is None:
        assert open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=resume).name == "rates"
    else:
        with pytest.raises(ResumeError, match=message) as caught:
            open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=resume)
        assert caught.value.fix


def test_a_driver_that_was_killed_before_it_had_its_name_locks_nothing(dataset: str, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, dataset, space=TWO_RATES)
    path = tmp_path / "out" / "rates"
    path.mkdir(parents=True)
    open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=False)
    (path / "sweep.json").unlink()
    open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=False)
    (path / "sweep.json").unlink()
    (path / "mine.txt").write_text("of someone else")
    with pytest.raises(ResumeError, match="something that is no sweep"):
        open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=False)


def test_the_last_line_of_a_trial_counts_and_a_torn_one_does_not(tmp_path: Path) -> None:
    folder = SweepDir(str(tmp_path), name="s")
    entry = folder.begin(0, {"a": 1})
    folder.note(replace(entry, state="finished", step=8, metrics={METRIC: 1.5}))
    folder.begin(1, {"a": 2})
    with (tmp_path / TRIALS).open("a") as stream:
        stream.write('{"index": 1, "name": "s-0')
    torn = (tmp_path / TRIALS).read_bytes()
    again = SweepDir(str(tmp_path), name="s")
    assert (tmp_path / TRIALS).read_bytes() == torn, "another driver may be writing the line"
    assert [(e.index, e.state, e.is_done) for e in again.trials] == [(0, "finished", True), (1, "running", False)]
    again.begin(1, {"a": 2})
    assert len((tmp_path / TRIALS).read_text().splitlines()) == 4
    assert SweepDir(str(tmp_path), name="s").trials[0].metrics == {METRIC: 1.5}


# --- proposals ---


def test_a_restart_runs_what_was_begun_first_and_nothing_that_ended(dataset: str, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, dataset, space={RATE: [1e-4, 2e-4, 3e-4, 4e-4]})
    trials = sweep.grid()
    states = {0: "finished", 1: "stopped", 3: "running"}
    past = [
        (TrialEntry(index, f"t{index}", trials[index], state), record(f"t{index}", 1.0, state=state))  # type: ignore[arg-type]
        for index, state in states.items()
    ]
    proposals = make_proposals(sweep, past=past)
    assert [proposals.next() for _ in range(3)] == [(3, trials[3]), (2, trials[2]), None]


def test_tpe_goes_on_where_it_was_and_prefers_what_was_good(dataset: str, tmp_path: Path) -> None:
    space = {RATE: {"log_uniform": [1e-5, 1e-1]}, "objective.block_size_max": [4, 8]}
    sweep = make_sweep(tmp_path, dataset, space=space, search={"name": "tpe", "num_trials": 60})
    past: list[tuple[TrialEntry, TrialRecord]] = []

    def run(proposals: Any, count: int) -> list[float]:
        rates = []
        for _ in range(count):
            index, parameters = proposals.next()
            cost = abs(math.log10(parameters[RATE] / 1e-3)) + (parameters["objective.block_size_max"] == 4)
            ended = record(f"t{index}", cost)
            proposals.tell(index, ended)
            past.append((TrialEntry(index, ended.name, parameters, "finished"), ended))
            rates.append(parameters[RATE])
        return rates

    run(make_proposals(sweep), 30)
    again = make_proposals(sweep, past=list(past))
    later = run(again, 30)
    assert [entry.index for entry, _ in past] == list(range(60))
    assert again.next() is None
    assert sum(1e-4 < rate < 1e-2 for rate in later) > 20, "half of them by chance"


# --- early stopping ---


class Trial:
    def __init__(self, name: str) -> None:
        self.trial_id = name


def verdicts(scheduler: Any, values: list[float]) -> list[str]:
    trial = Trial("new")
    scheduler.on_trial_add(None, trial)
    return [
        scheduler.on_trial_result(None, trial, {"step": 2 * step, METRIC: value})
        for step, value in enumerate(values, start=1)
    ]


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_restarted_scheduler_judges_by_the_trials_before(name: str) -> None:
    config = SchedulerConfig(name=name, grace_steps=2, reduction_factor=2)  # type: ignore[arg-type]
    past = [record("a", 3.0, 2.0, 1.0, 0.9), record("b", 3.1, 2.1, 1.1, 1.0), record("c", 3.2, state="stopped")]
    metric = MetricConfig(name=METRIC)

    def restarted() -> Any:
        return make_scheduler(config, metric, first_step=2, num_steps=8, past=past)

    assert verdicts(restarted(), [9.0])[0] == "STOP"
    assert verdicts(restarted(), [2.0, 1.0, 0.5]) == ["CONTINUE"] * 3
    fresh = make_scheduler(config, metric, first_step=2, num_steps=8)
    assert verdicts(fresh, [9.0]) == ["CONTINUE"]


def going_on(scheduler: Any, name: str, *curve: tuple[int, float]) -> Trial:
    """A trial that comes back with a new name after a restart."""
    trial = Trial(name)
    scheduler.on_trial_add(None, trial)
    catch_up(scheduler, trial, TrialRecord("before", {}, "running", {METRIC: list(curve)}), METRIC)
    return trial


def verdict(scheduler: Any, trial: Trial, step: int, value: float) -> str:
    return str(scheduler.on_trial_result(None, trial, {"step": step, METRIC: value}))


def fresh(scheduler: Any) -> Trial:
    return going_on(scheduler, "fresh")


def test_a_later_value_of_a_trial_that_goes_on_is_not_booked_at_a_rung_that_it_has_passed() -> None:
    config = SchedulerConfig(name="asha", grace_steps=100, reduction_factor=3)
    asha = make_scheduler(config, MetricConfig(name=METRIC), first_step=100, num_steps=900)
    trial = going_on(asha, "a", (100, 3.0))
    assert verdict(asha, trial, 250, 2.0) == "CONTINUE"
    assert verdict(asha, fresh(asha), 100, 2.5) == "CONTINUE", "better than the other one was at this step"
    assert verdict(asha, going_on(asha, "worse"), 100, 3.5) == "STOP"


def test_the_median_counts_what_trials_that_go_on_reported_and_judges_them_by_what_comes() -> None:
    config = SchedulerConfig(name="median", grace_steps=100)
    median = make_scheduler(config, MetricConfig(name=METRIC), first_step=100, num_steps=900)
    good = [going_on(median, name, (100, 3.0)) for name in "ab"]
    bad = going_on(median, "c", (100, 9.0))
    assert [verdict(median, trial, 250, 2.0) for trial in good] == ["CONTINUE"] * 2
    assert verdict(median, fresh(median), 100, 5.0) == "STOP"
    assert verdict(median, bad, 250, 9.0) == "STOP"


def test_without_early_stopping_there_is_nothing_to_catch_up_with() -> None:
    scheduler = make_scheduler(SchedulerConfig(), MetricConfig(name=METRIC), first_step=100, num_steps=900)
    assert verdict(scheduler, going_on(scheduler, "a", (100, 3.0)), 250, 2.0) == "CONTINUE"


def test_a_trial_catches_up_once_when_it_has_its_actor(dataset: str, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, dataset, space=TWO_RATES, scheduler={"name": "median", "grace_steps": 2})
    folder = open_sweep_dir(sweep, output_dir=str(tmp_path / "out"), resume=False)
    entry = folder.begin(0, {RATE: 1e-3})
    folder.note(replace(entry, step=4, metrics={METRIC: 3.0}))
    runner = SweepRunner(sweep, folder=folder, kind=None, view=SweepView())  # type: ignore[arg-type]
    trial = Trial("new")
    for _ in range(2):
        runner.started(entry.name, trial)
    assert dict(runner._judge._results) == {trial: [{"step": 4, METRIC: 3.0}]}


# --- capacity ---


def test_slots_are_counted_node_by_node() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 2.0, "GPU": 1.0}, {}]
    assert worker_slots(ScalingConfig(cpus_per_worker=2), nodes) == 2
    assert worker_slots(ScalingConfig(cpus_per_worker=0.5), nodes) == 10
    assert worker_slots(ScalingConfig(use_gpu=True), nodes) == 1
    assert require_slots(ScalingConfig(num_workers=5), nodes, where="x") == 5
    with pytest.raises(CapacityError, match="no trial fits") as caught:
        require_slots(ScalingConfig(num_workers=1, cpus_per_worker=4), nodes, where="x")
    assert "3 CPU; 2 CPU" in (caught.value.found or "")
    assert "1 workers of 4 CPU" in (caught.value.expected or "")


# --- what MLflow gets ---


@pytest.mark.usefixtures("mlflow_environment")
def test_a_trial_that_began_while_mlflow_was_away_finds_its_parent(
    dataset: str, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(output_dir, dataset, space={RATE: [1e-3, 3e-3]})
    recipe = sweep.resolve_trial(sweep.grid()[0])
    tracking = recipe.config.tracking.model_copy(update={"mlflow_uri": f"sqlite:///{output_dir}/mlflow.db"})
    recipe = replace(recipe, config=recipe.config.model_copy(update={"tracking": tracking}))
    trained = str(output_dir / "trained")
    with monkeypatch.context() as patch:
        patch.setattr(server, "connect", lambda uri: (_ for _ in ()).throw(ConnectionError("away")))
        parent = start_sweep_run(
            str(output_dir / "sweep"), name="sweep", values={}, tracking=tracking, output_dir=str(output_dir)
        )
        books = Bookkeeper(parent, sweep="sweep")
        books.begin(recipe, trained)
        is_begun = threading.Event()
        books._jobs.put(is_begun.set)
        assert is_begun.wait(60.0)
    books.end(recipe.config.name or "", trained, state="finished")
    measured = record("measured", 1.5)
    books.add_measured(measured, str(output_dir / "measured"), tracking=tracking, output_dir=str(output_dir))
    books.close()
    runs = {run.name: run for run in list_runs(tracking.mlflow_uri)}
    assert len(runs) == 3
    parents = {run.tags.get(PARENT_TAG) for name, run in runs.items() if name != "sweep"}
    assert parents == {runs["sweep"].run_id}
