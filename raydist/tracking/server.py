"""The one door to MLflow: a quiet client with short waits, and its failures in our words."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from raydist.core import storage
from raydist.core.errors import RaydistError, TrackingError
from raydist.core.log import quiet_libraries
from raydist.tracking.record import RunRecord
from raydist.tracking.secrets import has_secret, redact_text

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

RUN_KEY_TAG = "raydist.run_key"
_PARAMS_PER_CALL = 100
_DIGEST_CHARS = 36
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_HTTP_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
_ARTIFACT_TIMEOUT_S = "600"
# The server is there and says no: waiting does not help.
_REFUSALS = (
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
)
_DISK_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)

_Item = TypeVar("_Item")


def check_uri(uri: str) -> str:
    """Returns an address that MLflow understands and that carries no password.

    Raises:
        TrackingError: it is neither a server nor a database, or has credentials in it.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:  # half a bracket of an IPv6 address
        raise _no_address(repr(redact_text(uri))) from None
    scheme = parts.scheme.split("+")[0]
    if parts.password or (scheme in ("http", "https") and parts.username) or has_secret(uri):
        raise TrackingError(
            "credentials in the MLflow address would be stored with the run",
            where="tracking.mlflow_uri",
            found=f"{parts.scheme}://***@{parts.hostname}",
            fix="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGPASSWORD for PostgreSQL, and "
            "leave them out of the address",
        )
    if scheme not in ("http", "https", *_DATABASES):
        raise _no_address(repr(uri))
    return uri


def _no_address(found: str) -> TrackingError:
    return TrackingError(
        "not an MLflow address",
        where="tracking.mlflow_uri",
        found=found,
        expected="http(s)://host:port, sqlite:///path/mlflow.db, another database, or none",
    )


def connect(uri: str) -> MlflowClient:
    """A client; for a database this opens it and makes its tables, for a server it sends nothing.

    Waits are cut from MLflow's minutes to seconds, unless the user set MLFLOW_HTTP_REQUEST_* himself.
    """
    for key, value in _HTTP_DEFAULTS.items():
        os.environ.setdefault(key, value)
    quiet_libraries()
    if uri.startswith("sqlite:///"):
        storage.make_folder(os.path.dirname(uri.removeprefix("sqlite:///")))
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # importing mlflow sets its own levels
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def patient_http() -> Iterator[None]:
    """Lets single requests last as long as large artifacts take."""
    key = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(key)
    os.environ[key] = _ARTIFACT_TIMEOUT_S
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = before


def is_refusal(error: Exception) -> bool:
    """True where the server answered and trying again later would give the same answer."""
    return getattr(error, "error_code", None) in _REFUSALS


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns what MLflow raises inside the block into one :class:`TrackingError`."""
    try:
        yield
    except RaydistError:
        raise
    except Exception as error:  # MLflow lets errors of requests, sqlalchemy and the operating system through
        reason = short_reason(error)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise TrackingError("a file cannot be read or written", where=error.filename, found=reason) from error
        if is_refusal(error):
            raise TrackingError("the MLflow server refuses", where=uri, found=reason) from error
        raise TrackingError(
            "MLflow cannot be reached",
            where=uri,
            found=reason,
            expected="a running server, or an SQLite file that can be opened",
            fix="start the server or name another one: --mlflow-uri URI (in a recipe: tracking.mlflow_uri)",
        ) from error


def short_reason(error: Exception) -> str:
    """The first words of an error, innermost cause first: enough to know what happened."""
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    text = " ".join(str(error if is_refusal(error) else cause).split())
    return f"{type(cause).__name__}: {text[:160]}"


def ensure_run(client: MlflowClient, record: RunRecord) -> str:
    """The id of the record's run, which is created, or found by its key, and described if it has no id yet."""
    from mlflow.entities import Param

    if record.run_id is not None:
        return record.run_id
    experiment = ensure_experiment(client, record.experiment, artifact_location=record.artifact_location)
    found = client.search_runs([experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{record.key}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
    else:
        tags = {**record.tags, RUN_KEY_TAG: record.key}
        created = client.create_run(
            experiment.experiment_id, start_time=record.start_time_ms, tags=tags, run_name=record.name
        )
        run_id = created.info.run_id
    params = [Param(key, value) for key, value in sorted(record.params.items())]
    for chunk in chunks(params, _PARAMS_PER_CALL):
        client.log_batch(run_id, params=chunk)
    if record.datasets:
        client.log_inputs(run_id, _dataset_inputs(record))
    return str(run_id)


def ensure_experiment(client: MlflowClient, name: str, *, artifact_location: str | None) -> Experiment:
    """The experiment of this name, made if it is not there.

    Raises:
        TrackingError: it was deleted, and MLflow keeps its name.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.get_experiment(client.create_experiment(name, artifact_location=artifact_location))
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            "the MLflow experiment was deleted",
            where="tracking.experiment",
            found=name,
            fix=f"choose another name, or: mlflow experiments restore -x {experiment.experiment_id}",
        )
    return experiment


def _dataset_inputs(record: RunRecord) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for dataset in record.datasets:
        source_type = "s3" if storage.is_remote(dataset.path) else "local"
        source = json.dumps({"uri": dataset.path})
        entity = Dataset(dataset.name, dataset.digest[:_DIGEST_CHARS], source_type, source)
        inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", dataset.context)]))
    return inputs


def known_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """The highest step that the server has of each metric."""
    metrics = client.get_run(run_id).data.to_proto().metrics
    return {metric.key: int(metric.step) for metric in metrics}


def chunks(items: Sequence[_Item], size: int) -> Iterator[list[_Item]]:
    """Consecutive parts of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
