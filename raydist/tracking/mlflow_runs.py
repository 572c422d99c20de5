"""The driver's side of tracking: one MLflow run for all attempts, opened and ended by who outlives workers."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raydist.config.schema import RunConfig
from raydist.core import storage
from raydist.core.errors import ConfigError, TrackingError
from raydist.core.log import get_logger
from raydist.core.units import parse_bytes
from raydist.tracking import jsonl, server
from raydist.tracking.artifacts import ArtifactFile
from raydist.tracking.lineage import lineage_tags, read_source
from raydist.tracking.mirror import Mirror, spool_artifact, spool_pointers
from raydist.tracking.params import flat_params
from raydist.tracking.record import RUNNING, DatasetInput, RunRecord, load_record, save_record
from raydist.tracking.run_files import RUN_RECORD, RunFiles

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]

_MAX_TAG_CHARS = 8000
_DIFF_NAME = "git.diff"
_CONFIG_NAME = "config.yaml"
_log = get_logger(__name__)


@dataclass(frozen=True)
class MlflowTarget:
    """Where runs are tracked.

    Attributes:
        uri: server or database.
        artifact_location: for experiments made here; None leaves it to the server.
    """

    uri: str
    artifact_location: str | None


def resolve_uri(mlflow_uri: str | None, *, output_dir: str, experiment: str = "raydist") -> MlflowTarget | None:
    """The tracking server of a configuration; None where MLflow is off.

    ``mlflow_uri``, else the environment's MLFLOW_TRACKING_URI, else SQLite in the output directory. Of an SQLite
    database the artifacts lie beside it, in ``mlartifacts``.

    Raises:
        TrackingError: not an address that MLflow understands.
        ConfigError: SQLite cannot be kept in a bucket.
    """
    chosen = mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen == "none":
        return None
    if not chosen:
        if storage.is_remote(output_dir):
            raise ConfigError(
                "the embedded MLflow needs a local folder",
                where="tracking.mlflow_uri",
                found=f"null, with output_dir {output_dir}",
                expected="the address of an MLflow server, or none",
            )
        chosen = f"sqlite:///{storage.join(storage.local_path(output_dir), 'mlflow.db')}"
    uri = server.check_uri(chosen)
    location = None
    if uri.startswith("sqlite:///"):
        database = os.path.abspath(uri.removeprefix("sqlite:///"))
        uri = f"sqlite:///{database}"
        location = os.path.join(os.path.dirname(database), "mlartifacts", experiment)
    return MlflowTarget(uri, location)


class RunHandle:
    """The driver's hold on a run.

    Args:
        files: of the run directory.
    """

    def __init__(self, files: RunFiles) -> None:
        self._files = files

    @property
    def record(self) -> RunRecord | None:
        """What ``mlflow.json`` says; None where MLflow is off."""
        return load_record(self._files.path(RUN_RECORD))

    @property
    def run_id(self) -> str | None:
        """None where MLflow is off or has been away since the start."""
        record = self.record
        return record.run_id if record else None

    @property
    def uri(self) -> str | None:
        """The tracking server; None where MLflow is off."""
        record = self.record
        return record.uri if record else None

    def log_artifact(self, path: str, *, folder: str = "") -> None:
        """Adds a file or folder to the run; it is uploaded now if the server is there, else by the next sync."""
        if self.record is not None:
            spool_artifact(self._files, path, folder=folder)
            self._deliver()

    def point_to(self, pointers: Sequence[ArtifactFile], *, folder: str) -> None:
        """Lets the run point to files that stay in storage, in place of all it had below ``folder``; the next sync sends it."""
        if self.record is not None:
            spool_pointers(self._files, pointers, folder=folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run if the server is there; they are no part of what a later sync sends."""
        record = self.record
        if record is None or record.run_id is None:
            return
        try:
            client = server.connect(record.uri)
            for key, value in tags.items():
                client.set_tag(record.run_id, key, value[:_MAX_TAG_CHARS])
        except Exception as error:  # MLflow lets errors of many libraries through
            _log.warning("MLflow is away (%s); tags are not set: %s", server.short_reason(error), ", ".join(tags))

    def send(self) -> bool:
        """Sends what was logged since the last call; False if MLflow is away."""
        return self._deliver()

    def finish(self, status: EndStatus) -> bool:
        """Ends the run with all that workers left unsent; False if MLflow has to be synced later.

        Call it when no worker of the run is alive any more.
        """
        record = self.record
        if record is not None:
            ended = replace(record, status=status, end_time_ms=int(1000 * time.time()))
            save_record(ended, path=self._files.path(RUN_RECORD))
            if os.path.exists(self._files.path(jsonl.FILE_NAME)):
                spool_artifact(self._files, storage.join(self._files.run_dir, jsonl.FILE_NAME), folder="")
        return self._deliver()

    def _deliver(self) -> bool:
        if self.record is None:
            return self._publish()
        # what is sent from the bucket has to be there before
        if not self._publish(refresh=True):
            return False
        try:
            _synchronise(self._files)
        except Exception as error:  # MLflow lets errors of many libraries through; the run itself is safe on disk
            reason = server.short_reason(error)
            command = f"raydist runs sync {self._files.run_dir}"
            _log.warning("MLflow is away (%s); the run is kept and can be sent later: %s", reason, command)
            return False
        return self._publish()

    def _publish(self, *, refresh: bool = False) -> bool:
        """Brings the files here and in the bucket together; a bucket that is away ends no run, nor hides how it ended."""
        try:
            if refresh:
                self._files.refresh()
            self._files.publish()
        except Exception as error:  # an outage has many types
            reason = server.short_reason(error)
            command = f"raydist runs sync {self._files.run_dir}"
            _log.warning("the run directory is away (%s); send the run later, from this machine: %s", reason, command)
            return False
        return True


def start_run(
    config: RunConfig,
    *,
    run_dir: str,
    datasets: Sequence[DatasetInput] = (),
    tags: Mapping[str, str] | None = None,
) -> RunHandle:
    """Opens the MLflow run of a run directory, or goes on with the one it has.

    Parameters, lineage, ``config.yaml`` (if the directory has it) and the uncommitted changes go in at the first start.
    If the server is away, the run directory keeps all of it and one warning is printed.

    Args:
        config: the resolved configuration.
        run_dir: local or remote.
        datasets: what is read.
        tags: besides lineage and ``config.tracking.tags``.

    Raises:
        ConfigError: the recipe holds a secret.
        TrackingError: the address is none, or the server refuses (no permission, experiment deleted).
    """
    files = RunFiles(run_dir)
    tracking = config.tracking
    target = resolve_uri(tracking.mlflow_uri, output_dir=config.output_dir, experiment=tracking.experiment)
    params = flat_params(config.model_dump(mode="json"))
    handle = RunHandle(files)
    if target is None:
        return handle
    known = handle.record
    if known is not None:
        record = replace(known, uri=target.uri, status=RUNNING, end_time_ms=None)
    else:
        record = _new_record(config, target, files=files, params=params, datasets=datasets, tags=tags or {})
    return open_run(files, record)


def open_run(files: RunFiles, record: RunRecord) -> RunHandle:
    """Opens the MLflow run that a record describes.

    Raises:
        TrackingError: the server refuses.
    """
    save_record(record, path=files.path(RUN_RECORD))
    _greet(files)
    return RunHandle(files)


def _new_record(
    config: RunConfig,
    target: MlflowTarget,
    *,
    files: RunFiles,
    params: dict[str, str],
    datasets: Sequence[DatasetInput],
    tags: Mapping[str, str],
) -> RunRecord:
    source = read_source()
    if source.diff:
        diff_path = storage.join(files.run_dir, _DIFF_NAME)
        storage.write_bytes(diff_path, source.diff.encode())
        spool_artifact(files, diff_path, folder="")
    config_path = storage.join(files.run_dir, _CONFIG_NAME)
    if storage.exists(config_path):
        spool_artifact(files, config_path, folder="")
    all_tags = {**lineage_tags(source), **config.tracking.tags, **tags, "raydist.run_dir": files.run_dir}
    all_tags.update((f"dataset.{dataset.name}", dataset.digest) for dataset in datasets)
    return RunRecord(
        uri=target.uri,
        experiment=config.tracking.experiment,
        artifact_location=target.artifact_location,
        name=config.name or os.path.basename(files.run_dir),
        key=uuid.uuid4().hex,
        start_time_ms=int(1000 * time.time()),
        params=params,
        tags={key: value[:_MAX_TAG_CHARS] for key, value in all_tags.items()},
        datasets=list(datasets),
        max_artifact_bytes=parse_bytes(config.tracking.max_artifact, where="tracking.max_artifact"),
    )


def _greet(files: RunFiles) -> None:
    """First contact: an outage is a warning, a refusal an error."""
    record = load_record(files.path(RUN_RECORD))
    assert record is not None
    try:
        with server.explained(record.uri):
            _synchronise(files)
    except TrackingError as error:
        if not isinstance(error.__cause__, Exception) or server.is_refusal(error.__cause__):
            raise
        _log.warning("MLflow at %s is away (%s); the run is kept and sent later", record.uri, error.found)
    files.publish()


def sync_run(run_dir: str) -> str:
    """Sends what MLflow lacks of a run directory, its end included; returns the run id.

    Raises:
        TrackingError: no run is tracked there, or MLflow is still away.
    """
    files = RunFiles(run_dir)
    record = load_record(files.path(RUN_RECORD))
    if record is None:
        raise TrackingError(
            "no MLflow run belongs to this directory",
            where=files.run_dir,
            expected=f"a file {RUN_RECORD}, which `raydist train` leaves unless tracking.mlflow_uri is none",
        )
    with server.explained(record.uri):
        run_id = _synchronise(files)
    files.publish()
    return run_id


def _synchronise(files: RunFiles) -> str:
    """Sends what waits, then sets the status that the record has."""
    run_id = Mirror(files).send_waiting()
    record = load_record(files.path(RUN_RECORD))
    assert record is not None
    client = server.connect(record.uri)
    if record.status == RUNNING:
        client.update_run(run_id, status=RUNNING)
    else:
        client.set_terminated(run_id, status=record.status, end_time=record.end_time_ms)
    return run_id
