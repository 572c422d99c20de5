"""A sweep from its file to its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raydist.config.schema import TrackingConfig
from raydist.config.sweep import Sweep
from raydist.core import storage
from raydist.evaluation.sweep_records import Goal, TrialRecord, final_value, ranking
from raydist.evaluation.sweep_report import write_report
from raydist.models.hf import read_meta
from raydist.runtime.bookkeeper import Bookkeeper
from raydist.runtime.cluster import connected
from raydist.runtime.sample_trials import SampleTrials, output_dir_of, read_rows, tracking_of
from raydist.runtime.sweep_capacity import alive_nodes
from raydist.runtime.sweep_dir import PICTURES, SPEC, TRIALS, SweepDir, open_sweep_dir
from raydist.runtime.sweep_view import Kind, SweepView
from raydist.runtime.train_trials import TrainTrials, check_sweep, require_room
from raydist.runtime.tune import SweepRunner
from raydist.tracking.mlflow_runs import RunHandle
from raydist.tracking.run_files import RunFiles
from raydist.tracking.sweep_runs import register_model, start_sweep_run


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
        model_version: of the registered model, where that was asked for.
    """

    folder: SweepDir
    records: list[TrialRecord]
    goals: list[Goal]
    pictures: list[str]
    parent: RunHandle
    best: TrialRecord | None
    failures: dict[str, str]
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
            min_cpus = config.scaling.num_workers * config.scaling.cpus_per_worker
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
        RaydistError: a mistake in the sweep, a name in use, a cluster that no trial fits into, ...
    """
    subject = _Subject.of(sweep, model_dir=model_dir)
    with connected(address=address, min_cpus=subject.min_cpus):
        if sweep.recipe is not None:
            require_room(sweep, alive_nodes())
        folder = open_sweep_dir(sweep, output_dir=subject.output_dir, resume=resume)
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
            runner = SweepRunner(sweep, folder=folder, kind=kind, view=view)
            runner.run()
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt)
            books.close(killed=killed)
            parent.finish("KILLED" if killed else "FAILED")
            raise
        books.close()
    return _conclude(sweep, folder, runner.records, parent, register=register)


def _conclude(
    sweep: Sweep, folder: SweepDir, records: Sequence[TrialRecord], parent: RunHandle, *, register: str | None
) -> SweepOutcome:
    goals = [Goal(metric.name, metric.mode) for metric in sweep.config.metric]
    ranked = ranking(records, goals[0].metric, goals[0].mode)
    best = ranked[0] if ranked and ranked[0].state == "finished" else None
    pictures = write_report(ranked, goals, folder=_made(folder.file(PICTURES)), title=sweep.name)
    version = None
    if best is not None and best.run_dir is not None and register is not None:
        version = register_model(RunHandle(RunFiles(best.run_dir)), name=register)
    _fill_parent(parent, folder, ranked, goals)
    failures = {entry.name: entry.failure for entry in folder.trials if entry.failure}
    return SweepOutcome(folder, ranked, goals, pictures, parent, best, failures, version)


def _fill_parent(parent: RunHandle, folder: SweepDir, ranked: Sequence[TrialRecord], goals: Sequence[Goal]) -> None:
    """Table, space, pictures, and the best trial's checkpoint by pointer."""
    best = ranked[0] if ranked and ranked[0].state == "finished" else None
    table = [
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
    storage.write_json(folder.file("ranking.json"), table)
    for name in (SPEC, TRIALS, "ranking.json"):
        parent.log_artifact(folder.file(name))
    parent.log_artifact(folder.file(PICTURES), folder=PICTURES)
    if best is not None and best.run_dir is not None:
        best_run_id = RunHandle(RunFiles(best.run_dir)).run_id
        pointer = {
            "trial": best.name,
            "run_dir": best.run_dir,
            "mlflow_run_id": best_run_id,
            "checkpoints": storage.join(best.run_dir, "checkpoints"),
            "model": storage.join(best.run_dir, "export"),
        }
        storage.write_json(folder.file("best.json"), pointer)
        parent.log_artifact(folder.file("best.json"))
        parent.set_tags({f"raydist.best_{key}": str(value) for key, value in pointer.items() if value})
    parent.finish("FINISHED")


def _made(folder: str) -> str:
    storage.make_folder(folder)
    return folder
