"""The part of a save that runs in a thread: host memory to files, files to storage, marker last. No collectives.

Workers tell each other through storage: each leaves a done file with the hashes of its shard, and rank 0 writes the
marker when it has seen all of them. The id of the save is in every done file, so those of a killed attempt at the same
step do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raydist.checkpoint import layout
from raydist.checkpoint.files import FileRecord, record_of_bytes
from raydist.checkpoint.shards import write_shard
from raydist.core import storage
from raydist.core.errors import CheckpointError
from raydist.core.log import get_logger
from raydist.core.units import format_duration

_log = get_logger(__name__)
_FIRST_POLL_S, _LAST_POLL_S = 0.02, 2.0


@dataclass(frozen=True)
class StagedSave:
    """All that one worker needs to store its part, in host memory.

    Attributes:
        folder: the checkpoint's folder.
        save_id: the same on all workers, different at each save.
        chunks: name to host tensor.
        table: content of ``metadata.json``; used on rank 0 only.
        trainer_state: content of ``trainer.json``; used on rank 0 only.
    """

    folder: str
    save_id: str
    step: int
    rank: int
    world_size: int
    chunks: Mapping[str, Tensor]
    table: Mapping[str, Any]
    trainer_state: Mapping[str, Any]


class PeerWait:
    """How long rank 0 waits for the other workers' done files; a run that ends in an error cuts it short."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._shortened = threading.Event()

    def shorten(self, *, timeout_s: float) -> None:
        """From now on wait no longer than ``timeout_s``."""
        self._timeout_s = timeout_s
        self._shortened.set()

    def done_file(self, path: str, *, save_id: str) -> dict[str, Any]:
        """The content of a done file of this save, once it is there.

        Raises:
            CheckpointError: it did not come in time.
        """
        started = time.monotonic()
        poll_s = _FIRST_POLL_S
        while True:
            if storage.exists(path):
                content: dict[str, Any] = storage.read_json(path)
                if content["save_id"] == save_id:
                    return content
            waited_s = time.monotonic() - started
            if waited_s > self._timeout_s:
                raise CheckpointError(
                    "another worker did not store its part of the checkpoint",
                    where=path,
                    found=f"nothing after {format_duration(waited_s)}",
                )
            if self._shortened.is_set():
                time.sleep(_FIRST_POLL_S)
            else:
                self._shortened.wait(poll_s)
                poll_s = min(2 * poll_s, _LAST_POLL_S)


def store(save: StagedSave, *, spool_dir: str | None, peers: PeerWait) -> None:
    """Stores this worker's shard; on rank 0 also the table, the trainer's state and, when all is there, the marker.

    Raises:
        CheckpointError: a file could not be stored here, or by another worker (seen on rank 0).
    """
    done_path = storage.join(save.folder, layout.done_name(save.rank))
    try:
        record = _store_shard(save, spool_dir=spool_dir)
        storage.write_json(done_path, {"save_id": save.save_id, "record": record.to_json()})
        if save.rank == 0:
            _complete(save, record, peers=peers)
    except Exception as error:
        if save.rank != 0:
            _report_failure(done_path, save.save_id, error)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            "the checkpoint could not be stored", where=save.folder, found=repr(error), fix="check the storage"
        ) from error


def _store_shard(save: StagedSave, *, spool_dir: str | None) -> FileRecord:
    target = storage.join(save.folder, layout.shard_name(save.rank))
    if not storage.is_remote(target):
        return write_shard(target, save.chunks)
    spooled = spool_path(save.folder, rank=save.rank, spool_dir=spool_dir)
    try:
        record = write_shard(spooled, save.chunks)
        storage.upload_file(spooled, target)
    finally:
        if os.path.exists(spooled):
            os.unlink(spooled)
    return record


def spool_path(folder: str, *, rank: int, spool_dir: str | None) -> str:
    """The node-local file that a shard passes through on its way to a bucket.

    It has the same name at every save of a run, so that killed attempts cannot fill the disk.
    """
    run = hashlib.sha256(os.path.dirname(folder).encode()).hexdigest()[:16]
    root = spool_dir or os.path.join(tempfile.gettempdir(), f"raydist-{os.getuid()}")
    os.makedirs(root, mode=0o700, exist_ok=True)
    return os.path.join(root, f"{run}-{layout.shard_name(rank)}")


def _complete(save: StagedSave, own: FileRecord, *, peers: PeerWait) -> None:
    files = {layout.shard_name(0): own}
    for name, content in ((layout.METADATA, save.table), (layout.TRAINER, save.trainer_state)):
        data = (json.dumps(content, sort_keys=True) + "\n").encode()
        storage.write_bytes(storage.join(save.folder, name), data)
        files[name] = record_of_bytes(data)
    for rank in range(1, save.world_size):
        path = storage.join(save.folder, layout.done_name(rank))
        content = peers.done_file(path, save_id=save.save_id)
        if "error" in content:
            raise CheckpointError(
                "another worker could not store its part of the checkpoint", where=path, found=content["error"]
            )
        files[layout.shard_name(rank)] = FileRecord.from_json(content["record"])
    checkpoint = layout.Checkpoint(save.folder, save.step, save.world_size, files)
    storage.write_json(storage.join(save.folder, layout.MARKER), checkpoint.to_json())


def _report_failure(done_path: str, save_id: str, error: Exception) -> None:
    """Tells rank 0, as well as a storage that just failed allows; the error itself surfaces on this worker."""
    try:
        storage.write_json(done_path, {"save_id": save_id, "error": str(error)})
    except Exception:
        _log.warning("rank 0 could not be told of the failure", exc_info=True)
