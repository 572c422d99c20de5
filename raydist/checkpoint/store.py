"""What a save does with its copy in host memory, in a thread: files, storage, marker last. No collectives.

Workers tell each other through storage: each leaves a done file with the hashes of its shard, and rank 0 writes the
marker when it has seen all of them. The id of the save is in every done file, so those of a killed attempt at the same
step do not count.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raydist.checkpoint import layout
from raydist.checkpoint.files import FileRecord, record_of_bytes
from raydist.checkpoint.shards import write_shard
from raydist.core import storage
from raydist.core.errors import CheckpointError, RaydistError, ResumeError
from raydist.core.log import get_logger
from raydist.core.retry import patience
from raydist.core.units import format_bytes, format_duration

_log = get_logger(__name__)
_FIRST_POLL_S, _LAST_POLL_S = 0.02, 2.0


@dataclass(frozen=True)
class StagedSave:
    """All that one worker needs to store its part.

    Attributes:
        folder: the checkpoint's folder.
        save_id: the same on all workers, different at each save.
        chunks: name to tensor; the model's and the optimizer's own until they are copied to host memory.
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

    def num_bytes(self) -> int:
        """Size of the chunks."""
        return sum(chunk.nbytes for chunk in self.chunks.values())


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


def store(
    save: StagedSave,
    *,
    to_host: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    spool_dir: str | None,
    peers: PeerWait,
    before_marker: Callable[[], None] | None = None,
) -> None:
    """Stores this worker's shard; on rank 0 also the table, the trainer's state and, when all is there, the marker.

    Args:
        save: this worker's part.
        to_host: copies the tensors to host memory.
        spool_dir: node-local folder for shards on their way to a bucket.
        peers: rank 0's wait for the others.
        before_marker: stores what else a resume from this checkpoint needs; called on rank 0 when all shards are stored.

    Raises:
        ResumeError: by ``to_host`` or ``before_marker``, where the run is not ours any more.
        CheckpointError: the copy was not made or a file not stored, here, or by another worker (seen on rank 0).
    """
    done_path = storage.join(save.folder, layout.done_name(save.rank))
    try:
        record = _store_shard(dataclasses.replace(save, chunks=to_host(save.chunks)), spool_dir=spool_dir)
        storage.write_json(done_path, {"save_id": save.save_id, "record": record.to_json()})
        if save.rank == 0:
            _complete(save, record, peers=peers, before_marker=before_marker)
    except ResumeError:  # the folder may be another driver's by now
        raise
    except Exception as error:
        if save.rank != 0:
            _report_failure(done_path, save.save_id, error)
        if isinstance(error, CheckpointError):
            raise
        found = str(error) if isinstance(error, RaydistError) else repr(error)
        raise CheckpointError(
            "the checkpoint could not be stored", where=save.folder, found=found, fix="check the storage"
        ) from error


def _store_shard(save: StagedSave, *, spool_dir: str | None) -> FileRecord:
    target = storage.join(save.folder, layout.shard_name(save.rank))
    if not storage.is_remote(target):
        with _disk_for(os.path.dirname(storage.local_path(target)), save.num_bytes(), key="output_dir"):
            return write_shard(target, save.chunks)
    spooled = spool_path(save.folder, rank=save.rank, spool_dir=spool_dir)
    try:
        with _disk_for(os.path.dirname(spooled), save.num_bytes(), key="checkpoint.spool_dir"):
            record = write_shard(spooled, save.chunks)
        storage.upload_file(spooled, target)
    finally:
        if os.path.exists(spooled):
            os.unlink(spooled)
    return record


@contextmanager
def _disk_for(folder: str, num_bytes: int, *, key: str) -> Iterator[None]:
    """Refuses to begin to write what does not fit, and says which key names the disk.

    Raises:
        CheckpointError: the disk of ``folder`` is too full, now or while the block writes.
    """
    os.makedirs(folder, exist_ok=True)
    free_bytes, failure = shutil.disk_usage(folder).free, None
    if free_bytes >= num_bytes:
        try:
            yield
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            failure = error.strerror
    raise CheckpointError(
        "the disk is too full for this worker's part of the checkpoint",
        where=folder,
        found=failure or f"{format_bytes(free_bytes)} free",
        expected=f"{format_bytes(num_bytes)} free",
        fix=f"free space, or choose another disk by {key}",
    )


def spool_path(folder: str, *, rank: int, spool_dir: str | None) -> str:
    """The node-local file that a shard passes through on its way to a bucket; the same at every save of a run.

    Raises:
        CheckpointError: somebody else made the folder, and could read what goes through it.
    """
    root = spool_root(spool_dir)
    os.makedirs(root, mode=0o700, exist_ok=True)
    if spool_dir is None and os.stat(root).st_uid != os.getuid():
        raise CheckpointError(
            "the spool folder belongs to another user of this machine",
            where=root,
            fix="name another one: checkpoint.spool_dir=FOLDER",
        )
    return os.path.join(root, _spool_prefix(os.path.dirname(folder)) + layout.shard_name(rank))


def clear_spool(run_dir: str, *, spool_dir: str | None) -> None:
    """Removes what killed attempts of the run left on this node; to be called while no save is in flight here."""
    root, prefix = spool_root(spool_dir), _spool_prefix(layout.checkpoints_folder(run_dir))
    for name in storage.list_names(root):
        if name.startswith(prefix):
            os.unlink(os.path.join(root, name))


def spool_root(spool_dir: str | None) -> str:
    """The folder that shards pass through on their way to a bucket."""
    return spool_dir or os.path.join(tempfile.gettempdir(), f"raydist-{os.getuid()}")


def _spool_prefix(checkpoints_folder: str) -> str:
    return hashlib.sha256(checkpoints_folder.encode()).hexdigest()[:16] + "-"


def _complete(save: StagedSave, own: FileRecord, *, peers: PeerWait, before_marker: Callable[[], None] | None) -> None:
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
    if before_marker is not None:
        before_marker()
    checkpoint = layout.Checkpoint(save.folder, save.step, save.world_size, files)
    storage.write_json(storage.join(save.folder, layout.MARKER), checkpoint.to_json())


def _report_failure(done_path: str, save_id: str, error: Exception) -> None:
    """Tells rank 0, as well as a storage that just failed allows; the error itself surfaces on this worker."""
    try:
        with patience(total_s=0.0):
            storage.write_json(done_path, {"save_id": save_id, "error": str(error)})
    except Exception:
        _log.warning("rank 0 could not be told of the failure", exc_info=True)
