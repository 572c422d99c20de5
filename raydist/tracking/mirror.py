"""Sends to MLflow what a run directory holds and the server does not have yet.

The position up to which ``metrics.jsonl`` was sent, and the highest step sent per metric, are kept in a file that is
replaced after each call. A step that an attempt repeats is not sent again. If the process dies between a call and its
record, the server's own highest steps fill the gap. The first step and the start of each attempt become tags, which tell
readers what a restart rolled back (:mod:`raydist.tracking.points`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from raydist.core import storage
from raydist.core.log import get_logger
from raydist.tracking import artifacts, jsonl, server
from raydist.tracking.points import attempt_tags
from raydist.tracking.record import RunRecord, load_record, save_record
from raydist.tracking.run_files import ARTIFACT_SPOOL, RUN_RECORD, SENT_RECORD, RunFiles

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

_METRICS_PER_CALL = 1000
_MAX_KEY_CHARS = 250
_log = get_logger(__name__)


@dataclass(frozen=True)
class Sent:
    """What the server has.

    Attributes:
        run_id: of which run.
        metrics_bytes: position in ``metrics.jsonl`` behind the last record sent.
        artifacts_bytes: position in the artifact spool behind the last artifact sent.
        last_steps: the highest step sent of each metric.
        last_attempt: the newest attempt whose tags were set.
    """

    run_id: str | None = None
    metrics_bytes: int = 0
    artifacts_bytes: int = 0
    last_steps: dict[str, int] = field(default_factory=dict)
    last_attempt: int = 0


@dataclass
class _Batch:
    """What one call sends, and what the server has then."""

    metrics: list[Metric]
    tags: dict[str, str]
    sent: Sent


class Mirror:
    """The way of one run directory to MLflow. Not for several threads.

    Args:
        files: of the run; ``mlflow.json`` must be there.
        tags: set on the run at the first contact.
    """

    def __init__(self, files: RunFiles, *, tags: Mapping[str, str] | None = None) -> None:
        self._files = files
        self._tags = dict(tags or {})
        self._client: MlflowClient | None = None
        self._record: RunRecord | None = None
        self._sent = _within(_load_sent(files.path(SENT_RECORD)), files)

    @property
    def sent(self) -> Sent:
        """How far the server is."""
        return self._sent

    def num_waiting(self) -> int:
        """Records and artifacts that were logged and not sent."""
        waiting = _lines(self._files.path(jsonl.FILE_NAME), self._sent.metrics_bytes)
        spooled = _lines(self._files.path(ARTIFACT_SPOOL), self._sent.artifacts_bytes)
        return sum(1 for _ in waiting) + sum(1 for _ in spooled)

    def send_waiting(self) -> str:
        """Sends everything logged so far; returns the run id.

        Raises:
            Exception: whatever MLflow raises when the server is away or refuses; calling again goes on from there.
        """
        client, record = self._contact()
        assert record.run_id is not None
        for batch in self._batches():
            for chunk in server.chunks(batch.metrics, _METRICS_PER_CALL):
                client.log_batch(record.run_id, metrics=chunk)
            for key, value in batch.tags.items():
                client.set_tag(record.run_id, key, value)
            self._advance(batch.sent)
        for line, position in _lines(self._files.path(ARTIFACT_SPOOL), self._sent.artifacts_bytes):
            self._send_artifact(client, record, line)
            self._advance(replace(self._sent, artifacts_bytes=position))
        return record.run_id

    def _contact(self) -> tuple[MlflowClient, RunRecord]:
        """The client and a record with a run id; creates the run if that could not be done before."""
        if self._client is not None and self._record is not None:
            return self._client, self._record
        path = self._files.path(RUN_RECORD)
        record = load_record(path)
        if record is None:
            raise FileNotFoundError(path)
        client = server.connect(record.uri)
        run_id = server.ensure_run(client, record)
        if record.run_id is None:
            record = replace(record, run_id=run_id)
            save_record(record, path=path)
        for key, value in self._tags.items():
            client.set_tag(run_id, key, value)
        before = self._sent if self._sent.run_id == run_id else Sent(run_id=run_id)
        merged = dict(before.last_steps)
        for key, step in server.known_steps(client, run_id).items():
            merged[key] = max(step, merged.get(key, step))
        self._advance(replace(before, last_steps=merged))
        self._client, self._record = client, record
        return client, record

    def _batches(self) -> Iterator[_Batch]:
        """What waits, in the order it was logged."""
        from mlflow.entities import Metric

        batch = _Batch([], {}, replace(self._sent, last_steps=dict(self._sent.last_steps)))
        for line, end in _lines(self._files.path(jsonl.FILE_NAME), self._sent.metrics_bytes):
            record = jsonl.parse_line(line) or {}
            step, time_ms = record.get("step", -1), int(1000 * float(record.get("time", 0)))
            values = {metric_key(name): value for name, value in jsonl.metrics_of(record).items()}
            known = batch.sent.last_steps
            fresh = [Metric(key, value, time_ms, step) for key, value in values.items() if step > known.get(key, -1)]
            if batch.metrics and len(batch.metrics) + len(fresh) > _METRICS_PER_CALL:
                yield batch
                batch = _Batch([], {}, replace(batch.sent, last_steps=dict(batch.sent.last_steps)))
            batch.metrics.extend(fresh)
            batch.sent.last_steps.update((metric.key, step) for metric in fresh)
            attempt = int(record.get("attempt", 0))
            if attempt > batch.sent.last_attempt:
                batch.tags |= attempt_tags(attempt, first_step=step, start_time_ms=time_ms)
            batch.sent = replace(batch.sent, metrics_bytes=end, last_attempt=max(attempt, batch.sent.last_attempt))
        if batch.sent.metrics_bytes > self._sent.metrics_bytes:
            yield batch

    def _send_artifact(self, client: MlflowClient, record: RunRecord, line: bytes) -> None:
        entry = json.loads(line)
        assert record.run_id is not None
        if "pointers" in entry:
            pointers = [artifacts.ArtifactFile(**pointer) for pointer in entry["pointers"]]
            artifacts.point_to(client, record.run_id, pointers, folder=entry["folder"])
            return
        if not storage.exists(entry["path"]):
            _log.warning("an artifact vanished before it was sent to MLflow: %s", entry["path"])
            return
        artifacts.upload(
            client,
            record.run_id,
            entry["path"],
            folder=entry["folder"],
            max_bytes=record.max_artifact_bytes,
        )

    def _advance(self, sent: Sent) -> None:
        if sent != self._sent:
            storage.write_json(self._files.path(SENT_RECORD), asdict(sent))
            self._sent = sent


def metric_key(name: str) -> str:
    """A metric name in the characters and length that every MLflow store takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_MAX_KEY_CHARS]


def spool_artifact(files: RunFiles, path: str, *, folder: str) -> None:
    """Notes an artifact for the mirror to send."""
    _append(files, {"path": storage.normalize(path), "folder": folder})


def spool_pointers(files: RunFiles, pointers: Sequence[artifacts.ArtifactFile], *, folder: str) -> None:
    """Notes files that stay where they are, in place of all below ``folder``."""
    _append(files, {"pointers": [asdict(pointer) for pointer in pointers], "folder": folder})


def _append(files: RunFiles, entry: Mapping[str, Any]) -> None:
    os.makedirs(files.folder, exist_ok=True)
    with open(files.path(ARTIFACT_SPOOL), "a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def _lines(path: str, position: int) -> Iterator[tuple[bytes, int]]:
    """Complete lines from a position on, each with the position behind it."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as stream:
        stream.seek(position)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            yield line, position


def _within(sent: Sent, files: RunFiles) -> Sent:
    """Positions that the files reach: one behind its file's end is of another copy of it, and says nothing of this one."""

    def position(name: str, stated: int) -> int:
        path = files.path(name)
        return stated if stated <= (os.path.getsize(path) if os.path.exists(path) else 0) else 0

    return replace(
        sent,
        metrics_bytes=position(jsonl.FILE_NAME, sent.metrics_bytes),
        artifacts_bytes=position(ARTIFACT_SPOOL, sent.artifacts_bytes),
    )


def _load_sent(path: str) -> Sent:
    """The record of what was sent; an unreadable one counts as none, since the server knows its own steps."""
    try:
        values: dict[str, Any] = storage.read_json(path)
        return Sent(**values)
    except (OSError, ValueError, TypeError):
        return Sent()
