"""``mlflow.json``: which MLflow run mirrors a run directory, and all it takes to create that run later.

Every attempt and every resume reads the same record, so there is one MLflow run. It is written before the server is
asked: if the server is away, ``run_id`` stays null and the mirror creates the run when the server is back.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from raydist.core import storage
from raydist.core.errors import TrackingError

RUNNING = "RUNNING"


@dataclass(frozen=True)
class DatasetInput:
    """One dataset of the run, as MLflow shows it.

    Attributes:
        name: a short name.
        path: the dataset's directory.
        digest: hash of its manifest.
        context: ``train`` or ``validation``.
    """

    name: str
    path: str
    digest: str
    context: str = "train"


@dataclass(frozen=True)
class RunRecord:
    """One run as MLflow should have it.

    Attributes:
        uri: server or database.
        experiment: its experiment; made on first use.
        artifact_location: where a new experiment keeps artifacts; None leaves it to the server.
        name: of the run.
        key: made once with the record and set as a tag, so that the run is found if its creation was not recorded.
        start_time_ms: wall-clock time of the first start.
        params: flat configuration.
        tags: lineage and the user's own.
        datasets: what the run reads.
        max_artifact_bytes: larger files are pointed to.
        run_id: None until the server has made the run.
        status: RUNNING, or the end status that the server has or shall get.
        end_time_ms: when the run ended.
    """

    uri: str
    experiment: str
    artifact_location: str | None
    name: str
    key: str
    start_time_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    max_artifact_bytes: int
    datasets: list[DatasetInput] = field(default_factory=list)
    run_id: str | None = None
    status: str = RUNNING
    end_time_ms: int | None = None


def load_record(path: str) -> RunRecord | None:
    """Reads a record; None if there is none.

    Raises:
        TrackingError: the file is damaged.
    """
    if not os.path.exists(path):
        return None
    try:
        values: dict[str, Any] = storage.read_json(path)
        datasets = [DatasetInput(**dataset) for dataset in values.pop("datasets")]
        return RunRecord(**values, datasets=datasets)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrackingError(
            "the record of the MLflow run cannot be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            fix="delete the file; the run then gets a new MLflow run, which `raydist runs sync` fills",
        ) from None


def save_record(record: RunRecord, *, path: str) -> None:
    """Writes a record atomically."""
    storage.write_json(path, dataclasses.asdict(record))
