"""A sweep in MLflow: one parent run, and the tags that make the trials' runs its children."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raydist.config.schema import TrackingConfig
from raydist.core.units import parse_bytes
from raydist.tracking.lineage import lineage_tags, read_source
from raydist.tracking.mlflow_runs import RunHandle, open_run, resolve_uri
from raydist.tracking.params import flat_params
from raydist.tracking.record import RUNNING, RunRecord
from raydist.tracking.run_files import RunFiles

PARENT_TAG = "mlflow.parentRunId"


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
    tags = {"raydist.sweep": sweep, "raydist.trial": trial}
    return tags if parent.run_id is None else {**tags, PARENT_TAG: parent.run_id}
