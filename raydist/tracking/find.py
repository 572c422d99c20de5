"""From what a user types, a run: an MLflow id, a run's name, or a run directory."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydist.core import storage
from raydist.core.errors import TrackingError
from raydist.tracking import server
from raydist.tracking.record import RunRecord, load_record
from raydist.tracking.run_files import RUN_RECORD, RunFiles

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MAX_RUNS = 1000
_MAX_NAMES_SHOWN = 5


@dataclass(frozen=True)
class TrackedRun:
    """A run as MLflow has it.

    Attributes:
        run_id: MLflow's id.
        name: of the run.
        uri: of the server.
        experiment: name of its experiment.
        status: RUNNING, FINISHED, FAILED, KILLED, SCHEDULED.
        start_time_ms: wall clock; None if the server does not say.
        end_time_ms: None while it runs.
        metrics: last value of each metric.
        last_step: highest step of any metric; None before the first.
        params: flat configuration.
        tags: lineage and the user's.
    """

    run_id: str
    name: str
    uri: str
    experiment: str
    status: str
    start_time_ms: int | None
    end_time_ms: int | None
    metrics: dict[str, float]
    last_step: int | None
    params: dict[str, str]
    tags: dict[str, str]


def list_runs(
    uri: str, *, experiment: str | None = None, status: str | None = None, limit: int = MAX_RUNS
) -> list[TrackedRun]:
    """The runs of an experiment, or of all, newest first; one query, however many there are.

    Args:
        uri: server or database.
        experiment: its name; None for all.
        status: only runs in this state: RUNNING, FINISHED, FAILED or KILLED.
        limit: most runs.

    Raises:
        TrackingError: the server is away, or has no such experiment.
    """
    _refuse_missing_database(uri)
    with server.explained(uri):
        client = server.connect(uri)
        experiments = {e.experiment_id: e.name for e in client.search_experiments()}
        chosen = [key for key, name in experiments.items() if experiment in (None, name)]
        if experiment is not None and not chosen:
            raise TrackingError(
                "no such experiment", where=uri, found=experiment, expected="one of " + ", ".join(experiments.values())
            )
        wanted = f"attributes.status = '{status}'" if status else ""
        runs = client.search_runs(chosen, wanted, order_by=["attributes.start_time DESC"], max_results=limit)
        return [_tracked(run, uri, experiments.get(run.info.experiment_id, "")) for run in runs]


def find_run(
    name_or_id: str, *, uri: str | None = None, experiment: str | None = None, output_dir: str | None = None
) -> TrackedRun:
    """One run.

    Args:
        name_or_id: a run directory, a name of one in ``output_dir``, an MLflow run id, or a run's name, which is looked
            for among the newest 1000 and means the newest of several.
        uri: the server; a run directory's own record says it.
        experiment: where to look for names; None for all.
        output_dir: where run directories are.

    Raises:
        TrackingError: there is none, with the nearest names; or the server is away.
    """
    places = [name_or_id, *([storage.join(output_dir, name_or_id)] if output_dir else [])]
    for place in places:
        record = _record_of(place)
        if record is None:
            continue
        if record.run_id is None:
            raise TrackingError(
                "the run has not reached MLflow yet",
                where=storage.normalize(place),
                fix=f"raydist runs sync {place}",
            )
        return _by_id(record.run_id, record.uri)
    if uri is None:
        raise TrackingError(
            "no run directory, and no MLflow to look in", found=name_or_id, expected=f"a folder with {RUN_RECORD}"
        )
    if re.fullmatch("[0-9a-f]{32}", name_or_id):
        return _by_id(name_or_id, uri)
    runs = list_runs(uri, experiment=experiment)
    for run in runs:
        if name_or_id == run.name:
            return run
    names = list(dict.fromkeys(run.name for run in runs))
    near = difflib.get_close_matches(name_or_id, names, n=_MAX_NAMES_SHOWN, cutoff=0.3) or names[:_MAX_NAMES_SHOWN]
    raise TrackingError(
        "no such run",
        where=uri,
        found=name_or_id,
        expected="one of " + ", ".join(near) if near else "any run: there is none yet",
        fix=f"raydist runs list --mlflow-uri {uri}",
    )


def _record_of(path: str) -> RunRecord | None:
    if storage.is_remote(path):
        return load_record(RunFiles(path).path(RUN_RECORD)) if storage.exists(storage.join(path, RUN_RECORD)) else None
    return load_record(os.path.join(storage.local_path(path), RUN_RECORD))


def _by_id(run_id: str, uri: str) -> TrackedRun:
    _refuse_missing_database(uri)
    with server.explained(uri):
        client = server.connect(uri)
        run = client.get_run(run_id)
        return _tracked(run, uri, _experiment_name(client, run.info.experiment_id))


def _experiment_name(client: MlflowClient, experiment_id: str) -> str:
    return str(client.get_experiment(experiment_id).name)


def _refuse_missing_database(uri: str) -> None:
    """Looking for runs must not create an empty database."""
    path = uri.removeprefix("sqlite:///")
    if path != uri and not os.path.exists(path):
        raise TrackingError(
            "no runs are tracked here",
            where=uri,
            expected="the database that `raydist train` makes in its output directory",
            fix="name the output directory (--output-dir) or the server (--mlflow-uri)",
        )


def _tracked(run: Any, uri: str, experiment: str) -> TrackedRun:
    data = run.data
    steps = [int(metric.step) for metric in data.to_proto().metrics]
    return TrackedRun(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        uri=uri,
        experiment=experiment,
        status=run.info.status,
        start_time_ms=run.info.start_time,
        end_time_ms=run.info.end_time,
        metrics=dict(data.metrics),
        last_step=max(steps, default=None),
        params=dict(data.params),
        tags=dict(data.tags),
    )
