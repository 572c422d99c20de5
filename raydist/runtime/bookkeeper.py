"""What a sweep's driver writes beside the trials: MLflow children, their curves, the parent. In one thread, off Tune's loop."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

from raydist.config.load import Recipe
from raydist.config.schema import TrackingConfig
from raydist.core import storage
from raydist.core.log import get_logger
from raydist.evaluation.curves import draw_curves
from raydist.evaluation.sweep_records import TrialRecord, TrialState
from raydist.tracking.jsonl import JsonlTracker, read_curve, read_records
from raydist.tracking.mlflow_runs import EndStatus, RunHandle, start_run
from raydist.tracking.sweep_runs import STATE_TAG, start_sweep_run, trial_tags
from raydist.training import run_dir as layout
from raydist.training.driver import dataset_inputs, point_to_checkpoint

_SEND_EVERY_S = 5.0
_END_STATUS: dict[TrialState, EndStatus] = {"failed": "FAILED", "waiting": "KILLED"}  # a waiting one can be resumed
_log = get_logger(__name__)


class Bookkeeper:
    """Opens, feeds and ends the MLflow runs of trials.

    Args:
        parent: of the sweep.
        sweep: its name.
    """

    def __init__(self, parent: RunHandle, *, sweep: str) -> None:
        self._parent = parent
        self._sweep = sweep
        self._is_away = False
        self._open: dict[str, RunHandle] = {}
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="raydist-bookkeeper", daemon=True)
        self._thread.start()

    def begin(self, recipe: Recipe, run_dir: str) -> None:
        """A trial starts, or goes on in the run that it has."""
        self._jobs.put(lambda: self._begin(recipe, run_dir))

    def end(self, name: str, run_dir: str, *, state: TrialState) -> None:
        """A trial ended; it leaves its curves, and its model if it finished."""
        self._jobs.put(lambda: self._end(name, run_dir, state=state))

    def add_measured(self, record: TrialRecord, run_dir: str, *, tracking: TrackingConfig, output_dir: str) -> None:
        """A trial that trains nothing ended: its whole run at once."""
        self._jobs.put(lambda: self._add_measured(record, run_dir, tracking=tracking, output_dir=output_dir))

    def close(self, *, killed: bool = False) -> None:
        """Waits until all is written; runs that are still open were not brought to an end by anyone."""
        self._jobs.put(None)
        self._thread.join()
        for handle in self._open.values():
            handle.finish("KILLED" if killed else "FAILED")

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_SEND_EVERY_S)
            except queue.Empty:
                job = self._send
            if job is None:
                return
            try:
                job()
            except Exception as error:  # a picture or a run less is no reason to lose a sweep
                _log.warning("a trial is not in MLflow in full: %s", error)

    def _send(self) -> None:
        if self._is_away:  # said once; what waits is sent when a trial ends
            return
        self._is_away = True
        handles = [self._parent, *self._open.values()]
        self._is_away = not all(handle.send() for handle in handles if handle.record is not None)

    def _begin(self, recipe: Recipe, run_dir: str) -> None:
        name = recipe.config.name or ""
        tags = trial_tags(self._parent, sweep=self._sweep, trial=name)
        tags["raydist.config_hash"] = recipe.config_hash
        datasets = dataset_inputs(recipe)
        self._open[name] = start_run(recipe.config, run_dir=run_dir, datasets=datasets, tags=tags)

    def _add_measured(self, record: TrialRecord, run_dir: str, *, tracking: TrackingConfig, output_dir: str) -> None:
        storage.make_folder(run_dir)
        _write_measured(record, storage.join(run_dir, layout.METRICS))
        handle = start_sweep_run(
            run_dir,
            name=record.name,
            values=record.parameters,
            tracking=tracking,
            output_dir=output_dir,
            tags=trial_tags(self._parent, sweep=self._sweep, trial=record.name),
        )
        self._tag(handle, record.name, state=record.state)
        handle.finish("FAILED" if record.state == "failed" else "FINISHED")

    def _end(self, name: str, run_dir: str, *, state: TrialState) -> None:
        handle = self._open.pop(name, None)
        try:
            if handle is not None and state != "stopped":  # the workers of a stopped trial may still save
                point_to_checkpoint(handle, run_dir)
            _add_files(handle, name, run_dir)
        finally:
            if handle is not None:
                self._tag(handle, name, state=state)
                handle.finish(_END_STATUS.get(state, "FINISHED"))

    def _tag(self, handle: RunHandle, name: str, *, state: TrialState) -> None:
        """The state, and the parent once more: it had no id yet if MLflow was away when the trial began."""
        if handle.run_id is not None and self._parent.run_id is None:
            self._parent.send()
        handle.set_tags({**trial_tags(self._parent, sweep=self._sweep, trial=name), STATE_TAG: state})


def _write_measured(record: TrialRecord, path: str) -> None:
    """The one line of a trial that trains nothing; a driver that was killed may have written it."""
    if any(line["step"] == record.num_steps for line in read_records(path)):
        return
    metrics = JsonlTracker(path)
    metrics.log_metrics({name: curve[-1][1] for name, curve in record.curve.items()}, step=record.num_steps)
    metrics.close()


def _add_files(handle: RunHandle | None, name: str, run_dir: str) -> None:
    """A trial's model, and its curves."""
    export = storage.join(run_dir, layout.EXPORT)
    if handle is not None and storage.exists(export):
        handle.log_artifact(export, folder="model")
    pictures = storage.join(run_dir, layout.PICTURES)
    storage.make_folder(pictures)
    curves = read_curve(storage.join(run_dir, layout.METRICS))
    if curves:
        draw_curves(curves, path=os.path.join(pictures, "curves.png"), title=name)
    if handle is not None:
        handle.log_artifact(pictures, folder="pictures")
