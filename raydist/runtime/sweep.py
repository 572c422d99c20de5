"""A sweep from its file to its report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from raydist.checkpoint.layout import MARKER, newest_complete
from raydist.config.schema import TrackingConfig
from raydist.config.sweep import Sweep
from raydist.core import storage
from raydist.core.errors import ConfigError, ResumeError
from raydist.evaluation.sweep_records import Goal, TrialRecord, final_value, ranking
from raydist.evaluation.sweep_report import write_report
from raydist.models.hf import read_meta
from raydist.runtime.bookkeeper import Bookkeeper
from raydist.runtime.cluster import connected
from raydist.runtime.sample_trials import SampleTrials, output_dir_of, read_rows, tracking_of
from raydist.runtime.sweep_capacity import alive_nodes, embedded_cpus
from raydist.runtime.sweep_dir import PICTURES, SPEC, TRIALS, SweepDir, open_sweep_dir
from raydist.runtime.sweep_runner import SweepRunner
from raydist.runtime.sweep_view import Kind, SweepView
from raydist.runtime.train_trials import TrainTrials, check_sweep, require_room
from raydist.serving.register import check_name, register_export
from raydist.tracking.artifacts import CHECKPOINTS, ArtifactFile
from raydist.tracking.find import find_run
from raydist.tracking.mlflow_runs import RunHandle, resolve_uri
from raydist.tracking.run_files import RunFiles
from raydist.tracking.sweep_runs import start_sweep_run, trials_in_full
from raydist.training.driver import checkpoint_files
from raydist.training.lease import DriverLease

_RANKING = "ranking.json"
_BEST = "best.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep leaves.

    Attributes:
        folder: its directory.
        records: all trials, best first.
        goals: what they are ranked by.
        pictures: files of the report.
        parent: the MLflow run of the sweep.
        best: the best finished trial; None if there is none.
        failures: why trials failed, by name.
        has_more: its time was over before all trials were done.
        model_version: of the registered model, where that was asked for.
    """

    folder: SweepDir
    records: list[TrialRecord]
    goals: list[Goal]
    pictures: list[str]
    parent: RunHandle
    best: TrialRecord | None
    failures: dict[str, str]
    has_more: bool
    model_version: int | None


@dataclass(frozen=True)
class _Subject:
    """What a sweep is about, checked.

    Attributes:
        output_dir: where the sweep's directory comes.
        tracking: which MLflow.
        min_cpus: that an embedded Ray must offer.
        trials: makes the trials.
    """

    output_dir: str
    tracking: TrackingConfig
    min_cpus: float
    trials: Callable[[Sweep, SweepDir, Bookkeeper], Kind]

    @classmethod
    def of(cls, sweep: Sweep, *, model_dir: str | None) -> _Subject:
        """Reads what must be there, and refuses trials that cannot be."""
        if sweep.recipe is not None:
            config = sweep.recipe.config
            check_sweep(sweep)
            min_cpus = embedded_cpus(config.scaling, machine_cpus=os.cpu_count() or 1)
            return cls(config.output_dir, config.tracking, min_cpus, TrainTrials)
        assert model_dir is not None
        sweep.validate_trials(sampling=read_meta(model_dir).get("sampling"))
        rows = read_rows(sweep, model_dir=model_dir)
        return cls(
            output_dir_of(sweep),
            tracking_of(sweep),
            1.0,
            lambda sweep, folder, books: SampleTrials(sweep, folder, books, model_dir, rows),
        )


def run_sweep(
    sweep: Sweep,
    *,
    resume: bool,
    view: SweepView,
    model_dir: str | None = None,
    address: str | None = None,
    register: str | None = None,
) -> SweepOutcome:
    """Runs a sweep, or what is left of it, and writes its report.

    Args:
        sweep: from :func:`raydist.config.sweep.load_sweep`.
        resume: go on with the sweep of this name; what ended is not run again, what was under way goes on from its
            checkpoint.
        view: is told what happens.
        model_dir: the model that a sweep over samplers is about.
        address: of a running cluster; None embeds one.
        register: name of a registered model that the best trial becomes a version of.

    Raises:
        RaydistError: a mistake in the sweep, a name in use, another driver of this sweep that is alive, a cluster that no
            trial fits into, a model that could not be registered, ...
    """
    if register is not None:
        _check_registration(sweep, register)
    subject = _Subject.of(sweep, model_dir=model_dir)
    with connected(address=address, min_cpus=subject.min_cpus):
        if sweep.recipe is not None:
            require_room(sweep, alive_nodes())
        folder = open_sweep_dir(sweep, output_dir=subject.output_dir, resume=resume)
        with _only_driver(folder.path):
            folder = SweepDir(folder.path, name=sweep.name)  # with what a driver wrote that has ended meanwhile
            runner, parent = _run_trials(sweep, folder, subject, view=view)
    return _conclude(sweep, folder, runner, parent, model_dir=model_dir, register=register)


def _check_registration(sweep: Sweep, name: str) -> None:
    """Refuses before the first trial what would fail after the last one.

    Raises:
        RaydistError: the sweep trains nothing, the name is none for a model, or MLflow is off.
    """
    if sweep.recipe is None:
        raise ConfigError(
            "a sweep over samplers trains nothing: there is no new model to register",
            where="--register",
            found=name,
            fix=f"leave it out; to register the model itself: raydist export {sweep.config.checkpoint} --register {name}",
        )
    check_name(name)
    config = sweep.recipe.config
    tracking = config.tracking
    if resolve_uri(tracking.mlflow_uri, output_dir=config.output_dir, experiment=tracking.experiment) is None:
        raise ConfigError(
            "MLflow is off, and its model registry with it",
            where="--register",
            found=f"{name}, with tracking.mlflow_uri (or MLFLOW_TRACKING_URI) none",
            expected="a server, or nothing for a database in the output directory",
            fix="leave --register out, or let the sweep be tracked: tracking.mlflow_uri=http://...",
        )


@contextmanager
def _only_driver(path: str) -> Iterator[None]:
    """Holds a sweep's directory: two drivers would train each trial twice, in the same directories.

    Raises:
        ResumeError: on entry, another driver is alive.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(DriverLease(path))
        except ResumeError as error:
            raise ResumeError(
                "another driver is running this sweep",
                where=path,
                found=error.found,
                expected="one driver for each sweep",
                fix="wait until it ends, or stop it, or give this sweep another name: name=...",
            ) from None
        yield


def _run_trials(sweep: Sweep, folder: SweepDir, subject: _Subject, *, view: SweepView) -> tuple[SweepRunner, RunHandle]:
    """Returns the runner of the trials, which have ended, and the MLflow run of the sweep, which has not."""
    parent = start_sweep_run(
        folder.path,
        name=sweep.name,
        values=sweep.config.model_dump(mode="json"),
        tracking=subject.tracking,
        output_dir=subject.output_dir,
        tags={"raydist.sweep": sweep.name},
    )
    books = Bookkeeper(parent, sweep=sweep.name)
    kind = subject.trials(sweep, folder, books)
    try:
        _complete_books(sweep, folder, kind, parent)
        runner = SweepRunner(sweep, folder=folder, kind=kind, view=view)
        runner.run()
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt | SystemExit)  # Ray turns SIGTERM into SystemExit
        books.close(killed=killed)
        parent.finish("KILLED" if killed else "FAILED")
        raise
    books.close()
    return runner, parent


def _complete_books(sweep: Sweep, folder: SweepDir, kind: Kind, parent: RunHandle) -> None:
    """Tells MLflow of the trials that ended before this start, as far as it does not know.

    That a trial ended is noted first and told to MLflow later, so a driver that was killed may not have come to it.
    """
    done = [entry for entry in folder.trials if entry.is_done]
    known = trials_in_full(parent) if done else None
    if known is None:
        return
    metrics = [metric.name for metric in sweep.config.metric]
    for entry in done:
        if (entry.name, entry.state) not in known:
            kind.rebook(entry.index, folder.record(entry, metrics))


def _conclude(
    sweep: Sweep,
    folder: SweepDir,
    runner: SweepRunner,
    parent: RunHandle,
    *,
    model_dir: str | None,
    register: str | None,
) -> SweepOutcome:
    """Writes what the sweep found, the table before anything that can fail."""
    goals = [Goal(metric.name, metric.mode) for metric in sweep.config.metric]
    ranked = ranking(runner.records, goals[0].metric, goals[0].mode)
    best = ranked[0] if ranked and ranked[0].state == "finished" else None
    storage.write_json(folder.file(_RANKING), _table(ranked, goals))
    pointer = None if best is None else _pointer(best, model_dir=model_dir)
    if pointer is not None:
        storage.write_json(folder.file(_BEST), pointer)
    pictures = _draw(sweep, folder, ranked, goals)
    _fill_parent(parent, folder, pointer)
    version = None
    if best is not None and best.run_dir is not None and register is not None:
        export = storage.join(best.run_dir, "export")
        version = register_export(find_run(best.run_dir), export=export, name=register).version
    failures = {entry.name: entry.failure for entry in folder.trials if entry.failure}
    return SweepOutcome(folder, ranked, goals, pictures, parent, best, failures, runner.has_more, version)


def _table(ranked: Sequence[TrialRecord], goals: Sequence[Goal]) -> list[dict[str, Any]]:
    return [
        {
            "trial": record.name,
            "state": record.state,
            "parameters": record.parameters,
            "step": record.num_steps,
            "seconds": round(record.seconds, 3),
            **{goal.metric: final_value(record, goal.metric) for goal in goals},
        }
        for record in ranked
    ]


def _pointer(best: TrialRecord, *, model_dir: str | None) -> dict[str, Any]:
    """Where the best trial's model is; that of a sweep over samplers is the one that all its trials sampled."""
    if model_dir is not None:
        return {"trial": best.name, "model": model_dir}
    assert best.run_dir is not None
    return {
        "trial": best.name,
        "run_dir": best.run_dir,
        "mlflow_run_id": RunHandle(RunFiles(best.run_dir)).run_id,
        "checkpoints": storage.join(best.run_dir, "checkpoints"),
        "checkpoint": _checkpoint_pointer(best.run_dir),
        "model": storage.join(best.run_dir, "export"),
    }


def _checkpoint_pointer(run_dir: str) -> dict[str, Any] | None:
    """The newest complete checkpoint; its hash is that of its marker, which has those of the other files."""
    newest = newest_complete(run_dir)
    if newest is None:
        return None
    files = checkpoint_files(newest)
    return {
        "step": newest.step,
        "path": newest.folder,
        "size": sum(file.size for file in files),
        "sha256": next(file.sha256 for file in files if file.name.endswith(f"/{MARKER}")),
        "files": [asdict(file) for file in files],
    }


def _draw(sweep: Sweep, folder: SweepDir, ranked: Sequence[TrialRecord], goals: Sequence[Goal]) -> list[str]:
    """The pictures; none where they cannot be drawn, which is no reason to lose a sweep."""
    pictures = folder.file(PICTURES)
    storage.make_folder(pictures)
    try:
        return write_report(ranked, goals, folder=pictures, title=sweep.name)
    except Exception as error:
        _log.warning("the sweep has no pictures: %s", error)
        return []


def _fill_parent(parent: RunHandle, folder: SweepDir, pointer: Mapping[str, Any] | None) -> None:
    """Table, space, pictures, and the best trial's model by pointer."""
    for name in (SPEC, TRIALS, _RANKING):
        parent.log_artifact(folder.file(name))
    parent.log_artifact(folder.file(PICTURES), folder=PICTURES)
    if pointer is not None:
        checkpoint = pointer.get("checkpoint")
        if checkpoint is not None:
            parent.point_to([ArtifactFile(**file) for file in checkpoint["files"]], folder=CHECKPOINTS)
        parent.log_artifact(folder.file(_BEST))
        places = {**pointer, "checkpoint": checkpoint and checkpoint["path"]}
        parent.set_tags({f"raydist.best_{key}": str(value) for key, value in places.items() if value})
    parent.finish("FINISHED")
