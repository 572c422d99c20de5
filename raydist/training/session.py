"""One attempt of a run, from opening the process group to the exported model.

The same function runs in a Ray Train worker, under ``torchrun`` and in a plain process. Whoever starts it has prepared the
run directory and the MLflow run (:func:`start`), and ends the run when no worker is alive (:func:`finish`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raydist.checkpoint.checkpointer import Checkpointer
from raydist.config.load import Recipe
from raydist.core import storage
from raydist.core.dist import Workers, process_group
from raydist.core.errors import ResumeError
from raydist.core.log import get_logger
from raydist.tracking.base import Tracker
from raydist.tracking.mlflow_tracker import open_tracker
from raydist.training import run_dir as layout
from raydist.training.artifacts import export_model, log_results
from raydist.training.hooks import Hook, RunFacts
from raydist.training.loop import TrainLoop
from raydist.training.preemption import Notice, StopNotice, sigterm_notice
from raydist.training.setup import Assembly, assemble, train_loader

_log = get_logger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What an attempt reached; equal on all ranks but for ``metrics`` of rank 0.

    Attributes:
        step: optimizer steps done.
        metrics: the last logged values.
        stopped: a hook ended the run before its last step.
        interrupted: a stop notice ended the attempt after a save; the run can be resumed.
    """

    step: int
    metrics: dict[str, float]
    stopped: bool = False
    interrupted: bool = False


def run_attempt(
    recipe: Recipe,
    *,
    run_dir: str,
    hooks: Sequence[Hook] = (),
    driver_tracks: bool = False,
    notice: Notice = lambda: None,
    is_ours: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Trains from the newest complete checkpoint, or from the start, to the end, and exports the model.

    Args:
        recipe: the resolved recipe.
        run_dir: prepared by :func:`raydist.training.run_dir.prepare_run_dir`.
        hooks: called on rank 0; one that ends the run early leaves no exported model.
        driver_tracks: the process that started the workers draws the pictures and feeds MLflow from ``metrics.jsonl``; this
            one then needs no MLflow, whose import alone takes seconds.
        notice: says when this process is about to be ended; SIGTERM does so too, where Python gets it. All ranks then save
            after the running step and end with :attr:`Outcome.interrupted`.
        is_ours: whether the run is still that of the driver that started this worker; asked before a checkpoint is written.

    Raises:
        RaydistError: a mistake of the user's, on every rank.
    """
    data = recipe.config.data
    storage.was_reached(run_dir, *(part.path for part in [*data.train, *data.validation]))
    with process_group(timeout_s=recipe.config.scaling.collective_timeout_s) as workers:
        parts = assemble(recipe.config, workers)
        tracker = _open_tracker(recipe, run_dir, workers, mirrored=not driver_tracks)
        try:
            with sigterm_notice() as sigterm:
                stop = StopNotice(sigterm, notice)
                outcome = _train(recipe, run_dir, parts, workers, tracker, hooks, stop, is_ours)
            if tracker is not None and not driver_tracks:
                tracker.flush()
                if not outcome.interrupted:
                    log_results(tracker, recipe, run_dir=run_dir)
            return outcome
        finally:
            if tracker is not None:
                tracker.close()


def _train(
    recipe: Recipe,
    run_dir: str,
    parts: Assembly,
    workers: Workers,
    tracker: Tracker | None,
    hooks: Sequence[Hook],
    notice: Notice,
    is_ours: Callable[[], bool],
) -> Outcome:
    config = recipe.config
    with Checkpointer(
        run_dir,
        keep=config.checkpoint.keep,
        keep_every_steps=config.checkpoint.keep_every_steps,
        keep_best=config.checkpoint.keep_best,
        spool_dir=config.checkpoint.spool_dir,
        workers=workers,
        before_marker=None if tracker is None else tracker.publish,
        is_ours=is_ours,
    ) as checkpointer:
        state = checkpointer.load_newest(parts.model, optimizer=parts.optimizer) or {}
        _require_same_data(state, parts, run_dir)
        start_step = int(state.get("step", 0))
        if workers.is_first:
            facts = _facts(recipe, parts, workers, start_step=start_step, warnings=checkpointer.passed_over)
            for hook in hooks:
                hook.on_start(facts)
        loader = train_loader(
            config, parts, workers, start_step=start_step, start_sample=int(state.get("samples_consumed", 0))
        )
        loop = TrainLoop(
            config, parts, workers=workers, checkpointer=checkpointer, tracker=tracker, hooks=hooks, notice=notice
        )
        try:
            metrics = loop.run(iter(loader), start_step=start_step, unlogged=state.get("unlogged"))
            loop.finish_saves()
        finally:
            loader.close()
    if loop.interrupted_at is not None:
        _log.warning("interrupted: step %d is saved, the run can go on from there", loop.interrupted_at)
        return Outcome(step=loop.interrupted_at, metrics=metrics, interrupted=True)
    if loop.stopped_at is not None:
        return Outcome(step=loop.stopped_at, metrics=metrics, stopped=True)
    export_model(recipe, parts, run_dir=run_dir, workers=workers, step=config.training.num_steps)
    return Outcome(step=config.training.num_steps, metrics=metrics)


def _open_tracker(recipe: Recipe, run_dir: str, workers: Workers, *, mirrored: bool) -> Tracker | None:
    if not workers.is_first:
        return None
    return open_tracker(run_dir, system_metrics=recipe.config.tracking.system_metrics, mirrored=mirrored)


def _facts(recipe: Recipe, parts: Assembly, workers: Workers, *, start_step: int, warnings: Sequence[str]) -> RunFacts:
    config = recipe.config
    return RunFacts(
        name=config.name or "",
        num_steps=config.training.num_steps,
        start_step=start_step,
        num_parameters=parts.model.config.num_parameters,
        tokens_per_step=config.training.batch_rows * config.data.seq_len,
        world_size=workers.world_size,
        warnings=tuple(warnings),
    )


def _require_same_data(state: dict[str, object], parts: Assembly, run_dir: str) -> None:
    """A resume reads on where it stopped, which means something only in the same data."""
    if state and state["data_hash"] != parts.data_hash:
        raise ResumeError(
            "the data changed since the checkpoint was written",
            where=storage.join(run_dir, layout.CONFIG) + ": data",
            found=f"data hash {parts.data_hash[:12]}",
            expected=f"{str(state['data_hash'])[:12]}",
            fix="restore the dataset, or start a new run on the new data: name=...",
        )
