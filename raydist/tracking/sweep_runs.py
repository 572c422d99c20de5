"""A sweep in MLflow: one parent run, and the tags that make the trials' runs its children."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raydist.config.schema import TrackingConfig
from raydist.core.log import get_logger
from raydist.core.units import parse_bytes
from raydist.tracking import server
from raydist.tracking.lineage import lineage_tags, read_source
from raydist.tracking.mlflow_runs import RunHandle, open_run, resolve_uri
from raydist.tracking.params import flat_params
from raydist.tracking.record import RUNNING, RunRecord
from raydist.tracking.run_files import RunFiles

PARENT_TAG = "mlflow.parentRunId"
TRIAL_TAG = "raydist.trial"
STATE_TAG = "raydist.trial_state"
_log = get_logger(__name__)


def start_sweep_run(
    folder: str,
    *,
    name: str,
    values: Mapping[str, Any],
    tracking: TrackingConfig,
    output_dir: str,
    tags: Mapping[str, str] | None = None,
) -> RunHandle:
    """Opens the run of a sweep's directory, or of a trial that trains nothing, or goes on with the one it has.

    Args:
        folder: the sweep's directory.
        name: of the run.
        values: the resolved sweep, or what the trial varies, which becomes the run's parameters.
        tracking: of the recipe that the trials train.
        output_dir: where the embedded MLflow is.
        tags: besides lineage and the configuration's own.

    Raises:
        ConfigError: the sweep holds a secret.
        TrackingError: the address is none, or the server refuses.
    """
    files = RunFiles(folder)
    handle = RunHandle(files)
    target = resolve_uri(tracking.mlflow_uri, output_dir=output_dir, experiment=tracking.experiment)
    params = flat_params(values)
    if target is None:
        return handle
    known = handle.record
    if known is not None:
        return open_run(files, replace(known, uri=target.uri, status=RUNNING, end_time_ms=None))
    record = RunRecord(
        uri=target.uri,
        experiment=tracking.experiment,
        artifact_location=target.artifact_location,
        name=name,
        key=uuid.uuid4().hex,
        start_time_ms=int(1000 * time.time()),
        params=params,
        tags={**lineage_tags(read_source()), **tracking.tags, **(tags or {}), "raydist.run_dir": folder},
        max_artifact_bytes=parse_bytes(tracking.max_artifact, where="tracking.max_artifact"),
    )
    return open_run(files, record)


def trial_tags(parent: RunHandle, *, sweep: str, trial: str) -> dict[str, str]:
    """The tags of a trial's run."""
    tags = {"raydist.sweep": sweep, TRIAL_TAG: trial}
    return tags if parent.run_id is None else {**tags, PARENT_TAG: parent.run_id}


def trials_in_full(parent: RunHandle) -> set[tuple[str, str]] | None:
    """Name and state of the trials whose runs are complete; None where MLflow is off or away.

    A run gets the tag with the state after everything else, and then ends: one that was ended in another state, or that
    lacks the tag or its parent, was left by a driver that was killed.
    """
    run_id, uri = parent.run_id, parent.uri
    if run_id is None or uri is None:
        return None
    try:
        client = server.connect(uri)
        places = [client.get_run(run_id).info.experiment_id]
        found, token = set(), None
        while True:
            page = client.search_runs(places, f"tags.`{PARENT_TAG}` = '{run_id}'", page_token=token)
            ended = [run.data.tags for run in page if run.info.status == "FINISHED"]
            found |= {(tags.get(TRIAL_TAG, ""), tags.get(STATE_TAG, "")) for tags in ended}
            token = page.token
            if not token:
                return found
    except Exception as error:  # MLflow lets errors of many libraries through
        _log.warning("MLflow is away (%s); trials of before are as they are there", server.short_reason(error))
        return None
