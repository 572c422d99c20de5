"""A sweep on Ray Tune: trials, early stopping, restart, and the books."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from raydist.config.sweep import Sweep
from raydist.core import storage
from raydist.core.errors import RaydistError
from raydist.evaluation.sweep_records import TrialRecord, TrialState
from raydist.runtime.cluster import RAY_ENVIRONMENT
from raydist.runtime.early_stopping import make_scheduler
from raydist.runtime.proposals import Proposals, make_proposals
from raydist.runtime.sweep_capacity import alive_nodes
from raydist.runtime.sweep_dir import SweepDir, TrialEntry
from raydist.runtime.sweep_view import Kind, SweepView
from raydist.runtime.trial_board import TrialBoard

_UNLIMITED = 10**6  # the searcher says when there are no more trials
_NEWS_EVERY_S = 0.5
_TUNE_FOLDER = ".tune"
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # trials.jsonl is what a restart reads
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass
class _Live:
    """A trial that runs.

    Attributes:
        entry: its line.
        share: of the cluster.
        started: on the monotonic clock.
        points: what it measured in this start, as ``(step, metrics)``.
        step: the last step that it logged.
    """

    entry: TrialEntry
    share: float
    started: float
    points: list[tuple[int, dict[str, float]]]
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
        self._done = {entry.name: self._record(entry) for entry in folder.trials if entry.is_done}
        self._live: dict[str, _Live] = {}
        self._deadline: float | None = None
        self._board: Any = None
        self._board_name = f"raydist-sweep-{uuid.uuid4().hex}"
        past = [(entry, self._record(entry)) for entry in folder.trials]
        self._proposals: Proposals = make_proposals(sweep, past=past)
        self._waiting: tuple[int, dict[str, Any]] | None = None
        self._nodes: list[dict[str, float]] = []

    @property
    def records(self) -> list[TrialRecord]:
        """All trials so far, running ones as they stand."""
        running = [self._running_record(live) for live in self._live.values()]
        return sorted([*self._done.values(), *running], key=lambda record: record.name)

    def run(self) -> None:
        """Runs Tune to the end; the cluster must be connected.

        Raises:
            RaydistError: the first trial does not fit into the cluster, or a trial's directory cannot be made.
        """
        for key, value in _TUNE_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        self._nodes = alive_nodes()
        self._waiting = self._proposals.next()
        if self._waiting is None:
            return
        self._say_plan(self._waiting[1])
        self._board = ray.remote(num_cpus=0)(TrialBoard).options(name=self._board_name, max_concurrency=10_000).remote()
        ray.get(self._board.take_news.remote())
        if self.sweep.config.budget.max_wall_s is not None:
            self._deadline = time.monotonic() + self.sweep.config.budget.max_wall_s
        searcher = _Searcher(self)
        tuner = self._tuner(searcher, self.kind.resources(self._waiting[1]))
        try:
            tuner.fit()
        finally:
            ray.kill(self._board)
            storage.remove_tree(self.folder.file(_TUNE_FOLDER))
        if searcher.error is not None:
            raise searcher.error

    def propose(self) -> dict[str, Any] | str | None:
        """The next trial for Tune; None where it has to wait for room, ``FINISHED`` where there is none any more."""
        if self._waiting is None:
            self._waiting = self._proposals.next()
        if self._waiting is None or (self._deadline is not None and time.monotonic() > self._deadline):
            return Searcher.FINISHED
        index, parameters = self._waiting
        share = self.kind.share(parameters, self._nodes)
        if self._live and sum(live.share for live in self._live.values()) + share > 1 + 1e-6:
            return None
        entry = self.folder.begin(index, parameters)
        config = self.kind.prepare(index, parameters)
        self._waiting = None
        self._live[entry.name] = _Live(entry, share, time.monotonic(), [])
        self.view.on_change(self.records)
        return {**config, "name": entry.name, "board": self._board_name, "environment": RAY_ENVIRONMENT}

    def measured(self, name: str, result: Mapping[str, Any]) -> None:
        """A trial reported."""
        live = self._live[name]
        values = {key: float(result[key]) for key in self.metrics if key in result}
        if values:
            live.points.append((int(result["step"]), values))
        live.step = max(live.step, int(result["step"]))
        self.view.on_change(self.records)

    def ended(self, name: str, result: Mapping[str, Any], *, failure: str = "") -> None:
        """A trial finished, was stopped or failed."""
        live = self._live.pop(name, None)
        if live is None:
            return
        is_done = bool(result.get("done"))
        if not is_done:
            self._board.stop.remote(name)
        failure = failure or str(result.get("failure", ""))
        finished = is_done and result.get("trial_state") == "finished"
        state: TrialState = "failed" if failure else "finished" if finished else "stopped"
        entry = replace(
            live.entry,
            state=state,
            seconds=live.entry.seconds + time.monotonic() - live.started,
            metrics={key: value for _, values in live.points for key, value in values.items()},
            failure=failure,
        )
        curves = self._record(entry).curve
        steps = [curve[-1][0] for curve in curves.values()]
        last = {key: curve[-1][1] for key, curve in curves.items()}
        entry = self.folder.note(replace(entry, metrics=last, step=max([live.step, *steps])))
        self._done[name] = record = self._record(entry)
        self._proposals.tell(entry.index, record)
        self.kind.ended(record)
        self.view.on_end(record, failure=failure)
        self.view.on_change(self.records)

    def refresh(self) -> None:
        """Takes what the board has, and ends what the budget no longer covers."""
        for name, step, _ in ray.get(self._board.take_news.remote()):
            if name in self._live:
                self._live[name].step = max(self._live[name].step, step)
        if self._deadline is not None and time.monotonic() > self._deadline:
            for name in self._live:
                self._board.stop.remote(name)
        self.view.on_change(self.records)

    def _record(self, entry: TrialEntry) -> TrialRecord:
        return self.folder.record(entry, self.metrics)

    def _running_record(self, live: _Live) -> TrialRecord:
        curve = {
            metric: [(step, values[metric]) for step, values in live.points if metric in values]
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
        at_once = int(1 / share + 1e-6)
        cpus = sum(node.get("CPU", 0.0) for node in self._nodes)
        gpus = sum(node.get("GPU", 0.0) for node in self._nodes)
        cluster = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "") + f" on {len(self._nodes)} node(s)"
        self.view.on_plan(at_once=at_once, text=f"{at_once} trial{'s' if at_once > 1 else ''} at a time on {cluster}")

    def _tuner(self, searcher: Searcher, resources: dict[str, float]) -> tune.Tuner:
        return tune.Tuner(
            tune.with_resources(self.kind.trainable, tune.PlacementGroupFactory([resources])),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=self._scheduler(),
                num_samples=_UNLIMITED,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=f"start-{os.getpid()}",
                storage_path=storage.local_path(self.folder.file(_TUNE_FOLDER)),
                callbacks=[_Callback(self)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )

    def _scheduler(self) -> Any:
        recipe = self.sweep.recipe
        training = None if recipe is None else recipe.config.training
        return make_scheduler(
            self.sweep.config.scheduler,
            self.sweep.config.metric[0],
            first_step=(training.validate_every_steps or 1) if training else 1,
            num_steps=training.num_steps if training else 1,
            past=self._done.values(),
        )


def _trial_name(trial: Any) -> str:
    return str(trial.config["name"])


class _Searcher(Searcher):
    """Hands the runner's trials to Tune."""

    def __init__(self, runner: SweepRunner) -> None:
        super().__init__()
        self._runner = runner
        self.error: RaydistError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes its own state, of which nothing is read again."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """The configuration of the next trial."""
        try:
            return self._runner.propose()
        except RaydistError as error:
            self.error = error
            return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The runner learns of it from the callback."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing to keep."""


class _Callback(tune.Callback):
    """Tells the runner what Tune sees."""

    def __init__(self, runner: SweepRunner) -> None:
        self._runner = runner
        self._refreshed_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Now and then looks at the board."""
        if time.monotonic() - self._refreshed_at > _NEWS_EVERY_S:
            self._runner.refresh()
            self._refreshed_at = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A validation, or the end."""
        self._runner.measured(_trial_name(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Finished, or stopped by the scheduler."""
        self._runner.ended(_trial_name(trial), trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's actor died."""
        last_words = str(trial.get_error() or "its actor died").strip().splitlines()[-1]
        self._runner.ended(_trial_name(trial), {**(trial.last_result or {}), "done": True}, failure=last_words)
