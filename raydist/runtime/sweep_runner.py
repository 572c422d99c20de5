"""The trials of a sweep as its driver runs them: which is next, what came of each, and when there is room and time."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydist.config.sweep import Sweep
from raydist.core import storage
from raydist.core.errors import CapacityError, ConfigError
from raydist.evaluation.sweep_records import TrialRecord, TrialState
from raydist.runtime.cluster import ray_environment
from raydist.runtime.early_stopping import catch_up, make_scheduler
from raydist.runtime.proposals import Proposals, make_proposals
from raydist.runtime.sweep_capacity import alive_nodes
from raydist.runtime.sweep_dir import SweepDir, TrialEntry
from raydist.runtime.sweep_view import Kind, SweepView
from raydist.runtime.trial_board import TrialBoard
from raydist.runtime.trial_stages import durations_s, mark
from raydist.runtime.tune import Pause, run_on_tune

_TUNE_FOLDER = ".tune"
_SLACK = 1e-6  # of sums of shares


@dataclass
class _Live:
    """A trial that runs.

    Attributes:
        entry: its line.
        share: of the cluster as it is now.
        started: on the monotonic clock.
        began: in seconds since 1970.
        points: what it measured in this start: metrics by step.
        step: the last step that it logged.
    """

    entry: TrialEntry
    share: float
    started: float
    began: float
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    step: int = 0


class SweepRunner:
    """Runs the trials of a sweep that are not done yet, and keeps ``trials.jsonl``.

    Args:
        sweep: the sweep.
        folder: its directory.
        kind: what trials are.
        view: is told what happens.
    """

    def __init__(self, sweep: Sweep, *, folder: SweepDir, kind: Kind, view: SweepView) -> None:
        self.sweep = sweep
        self.folder = folder
        self.kind = kind
        self.view = view
        self.metrics = [metric.name for metric in sweep.config.metric]
        past = [(entry, self._record(entry)) for entry in folder.trials]
        self._ended = {entry.name: _at_rest(record) for entry, record in past}
        self._live: dict[str, _Live] = {}
        self._deadline: float | None = None
        self._board: Any = None
        self._board_name = f"raydist-sweep-{uuid.uuid4().hex}"
        self._under_way = {entry.name: record for entry, record in past if not entry.is_done}
        self._judge = self._scheduler([record for entry, record in past if entry.is_done])
        self._proposals: Proposals = make_proposals(sweep, past=past)
        self._waiting: tuple[int, dict[str, Any]] | None = None
        self._nodes: list[dict[str, float]] = []

    @property
    def records(self) -> list[TrialRecord]:
        """All trials so far, running ones as they stand; also those of earlier starts that are not begun again yet."""
        running = {name: self._running_record(live) for name, live in self._live.items()}
        return sorted((self._ended | running).values(), key=lambda record: record.name)

    @property
    def has_more(self) -> bool:
        """The budget ended the sweep before all its trials were done."""
        return self._waiting is not None or any(record.state == "waiting" for record in self._ended.values())

    def run(self) -> None:
        """Runs Tune to the end; the cluster must be connected.

        Raises:
            RaydistError: the first trial does not fit into the cluster, or a trial's directory cannot be made.
        """
        self._nodes = alive_nodes()
        self._waiting = self._next()
        if self._waiting is None:
            return
        self._say_plan(self._waiting[1])
        # On the driver's node, so that no other node's loss takes it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(num_cpus=0, scheduling_strategy=here, max_concurrency=10_000)(TrialBoard)
        self._board = board.options(name=self._board_name).remote()
        ray.get(self._board.take_news.remote())
        if self.sweep.config.budget.max_wall_s is not None:
            self._deadline = time.monotonic() + self.sweep.config.budget.max_wall_s
        try:
            run_on_tune(
                self,
                trainable=self.kind.trainable,
                resources=self.kind.resources(self._waiting[1]),
                scheduler=self._judge,
                folder=self.folder.file(_TUNE_FOLDER),
            )
        finally:
            ray.kill(self._board)
            storage.remove_tree(self.folder.file(_TUNE_FOLDER))

    def propose(self) -> dict[str, Any] | Pause:
        """The next trial for Tune, or why there is none now."""
        if self._live and not self._may_have_room():
            return Pause.FOR_ROOM  # before a searcher is asked, which knows more when a trial has ended
        if self._waiting is None:
            self._waiting = self._next()
        if self._waiting is None or (self._deadline is not None and time.monotonic() > self._deadline):
            return Pause.FOR_GOOD
        index, parameters = self._waiting
        try:
            share = self.kind.share(parameters, self._nodes)
        except CapacityError:
            if not self._live:
                raise
            return Pause.FOR_ROOM  # nodes went since the start; they may come back
        if self._live and sum(live.share for live in self._live.values()) + share > 1 + _SLACK:
            return Pause.FOR_ROOM
        entry = self.folder.begin(index, parameters)
        config = self.kind.prepare(index, parameters)
        self._waiting = None
        self._live[entry.name] = _Live(entry, share, time.monotonic(), time.time())
        self.view.on_change(self.records)
        return {**config, "name": entry.name, "board": self._board_name, "environment": ray_environment()}

    def started(self, name: str, trial: Any) -> None:
        """A trial has its actor; one that was under way before a restart brings its past along."""
        record = self._under_way.pop(name, None)
        if record is not None:
            catch_up(self._judge, trial, record, self.metrics[0])

    def measured(self, name: str, result: Mapping[str, Any]) -> None:
        """A trial reported."""
        live = self._live[name]
        values = {key: float(result[key]) for key in self.metrics if key in result}
        if values:
            live.points[int(result["step"])] = values
        live.step = max(live.step, int(result["step"]))
        self.view.on_change(self.records)

    def ended(self, name: str, result: Mapping[str, Any], *, failure: str = "") -> None:
        """A trial finished, was stopped or failed."""
        live = self._live.pop(name, None)
        if live is None:
            return
        failure = failure or str(result.get("failure", ""))
        state = _state(result, failure=failure)
        if state == "stopped":
            self._board.stop.remote(name)
        entry = replace(
            live.entry,
            state=state,
            seconds=live.entry.seconds + time.monotonic() - live.started,
            metrics={key: value for values in live.points.values() for key, value in values.items()},
            failure=failure,
        )
        curves = self._record(entry).curve
        steps = [curve[-1][0] for curve in curves.values()]
        last = {key: curve[-1][1] for key, curve in curves.items()}
        marks = dict(result.get("marks", {}))
        mark(marks, "report")
        stages_s = durations_s(live.began, marks)
        entry = self.folder.note(replace(entry, metrics=last, step=max([live.step, *steps]), stages_s=stages_s))
        self._book(entry)

    def refresh(self) -> None:
        """Takes what the board has, counts the nodes anew, and ends what the budget no longer covers."""
        for name, step, _ in ray.get(self._board.take_news.remote()):
            if name in self._live:
                self._live[name].step = max(self._live[name].step, step)
        if self._deadline is not None and time.monotonic() > self._deadline:
            for name in self._live:
                self._board.stop.remote(name)
        nodes = alive_nodes()
        if nodes != self._nodes:
            self._nodes = nodes
            for live in self._live.values():
                live.share = self._share_now(live.entry.parameters)
        self.view.on_change(self.records)

    def _next(self) -> tuple[int, dict[str, Any]] | None:
        """The next trial that can be; one that its recipe does not take, which only a searcher proposes, is noted as failed."""
        while (proposal := self._proposals.next()) is not None:
            index, parameters = proposal
            try:
                self.kind.check(parameters)
                return proposal
            except ConfigError as error:
                entry = self.folder.begin(index, parameters)
                self._book(self.folder.note(replace(entry, state="failed", failure=str(error))))
        return None

    def _may_have_room(self) -> bool:
        """Whether another trial can start, as far as that can be said of one that is not known yet."""
        free = 1 - sum(live.share for live in self._live.values())
        if any(key.split(".")[0] == "scaling" for key in self.sweep.config.space):
            return free > _SLACK
        return free + _SLACK >= max(live.share for live in self._live.values())

    def _book(self, entry: TrialEntry) -> None:
        """Tells everyone of a trial that ended."""
        record = self._ended[entry.name] = self._record(entry)
        if entry.is_done or entry.state == "failed":
            self._proposals.tell(entry.index, record)
        self.kind.ended(record)
        self.view.on_end(record, failure=entry.failure)
        self.view.on_change(self.records)

    def _share_now(self, parameters: Mapping[str, Any]) -> float:
        """Of a trial that runs; all of a cluster that has become too small for it."""
        try:
            return self.kind.share(parameters, self._nodes)
        except CapacityError:
            return 1.0

    def _record(self, entry: TrialEntry) -> TrialRecord:
        return self.folder.record(entry, self.metrics)

    def _running_record(self, live: _Live) -> TrialRecord:
        curve = {
            metric: [(step, values[metric]) for step, values in sorted(live.points.items()) if metric in values]
            for metric in self.metrics
        }
        return TrialRecord(
            name=live.entry.name,
            parameters=live.entry.parameters,
            state="running",
            curve=curve,
            num_steps=live.step,
            seconds=live.entry.seconds + time.monotonic() - live.started,
        )

    def _say_plan(self, parameters: Mapping[str, Any]) -> None:
        share = self.kind.share(parameters, self._nodes)
        at_once = int(1 / share + _SLACK)
        cpus = sum(node.get("CPU", 0.0) for node in self._nodes)
        gpus = sum(node.get("GPU", 0.0) for node in self._nodes)
        cluster = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "") + f" on {len(self._nodes)} node(s)"
        self.view.on_plan(at_once=at_once, text=f"{at_once} trial{'s' if at_once > 1 else ''} at a time on {cluster}")

    def _scheduler(self, past: Sequence[TrialRecord]) -> Any:
        recipe = self.sweep.recipe
        training = None if recipe is None else recipe.config.training
        return make_scheduler(
            self.sweep.config.scheduler,
            self.sweep.config.metric[0],
            first_step=(training.validate_every_steps or 1) if training else 1,
            num_steps=training.num_steps if training else 1,
            past=past,
        )


def _at_rest(record: TrialRecord) -> TrialRecord:
    """A trial of an earlier start; none of those that a killed driver left running runs now."""
    return replace(record, state="waiting") if record.state == "running" else record


def _state(result: Mapping[str, Any], *, failure: str) -> TrialState:
    """The scheduler ends a trial that runs; one that says itself that it was stopped ran out of time, and can go on."""
    if failure:
        return "failed"
    states: dict[str, TrialState] = {"running": "stopped", "stopped": "waiting", "finished": "finished"}
    return states[result.get("trial_state", "running")]
