"""Saves and resumes of one run.

A save blocks for the copy to host memory only; a thread stores the copy (:mod:`raydist.checkpoint.store`). One save is
in flight at most: the next one waits for it, and the wait is reported. What fails in the thread is raised by the next
call, on all workers.
"""

from __future__ import annotations

import platform
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.optim import Optimizer

import raydist
from raydist.checkpoint import layout
from raydist.checkpoint.agreement import on_first_worker, raise_together, single_error
from raydist.checkpoint.load import load_checkpoint
from raydist.checkpoint.retention import delete_expired
from raydist.checkpoint.staging import HostStagingWriter
from raydist.checkpoint.state import model_tensors, optimizer_tensors
from raydist.checkpoint.store import PeerWait, StagedSave, store
from raydist.core import storage
from raydist.core.dist import Workers
from raydist.core.errors import CheckpointError
from raydist.core.log import get_logger

_GRACE_AFTER_ERROR_S = 10.0
_log = get_logger(__name__)


@dataclass(frozen=True)
class SaveTimings:
    """What one save cost the training loop.

    Attributes:
        wait_s: time until the previous save was stored.
        stage_s: time to plan and to copy to host memory.
    """

    wait_s: float
    stage_s: float


class Checkpointer:
    """All workers construct it and call its methods together.

    Args:
        run_dir: the run's folder, local (shared by all workers) or in a bucket.
        keep: complete checkpoints kept.
        workers: who this process is.
        spool_dir: node-local folder for shards on their way to a bucket; default: below the system's temporary folder.
        peer_timeout_s: how long rank 0 waits for the other workers' shards before the save counts as failed.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        keep: int,
        workers: Workers,
        spool_dir: str | None = None,
        peer_timeout_s: float = 1800.0,
    ) -> None:
        self.run_dir = storage.normalize(run_dir)
        self._keep = keep
        self._workers = workers
        self._spool_dir = spool_dir
        self._peers = PeerWait(timeout_s=peer_timeout_s)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._peers.shorten(timeout_s=_GRACE_AFTER_ERROR_S)
        self._join()
        if self._error is not None:
            _log.warning("the last checkpoint was not stored: %s", self._error)

    def save(
        self, step: int, *, model: nn.Module, optimizer: Optimizer, trainer_state: Mapping[str, Any]
    ) -> SaveTimings:
        """Stages the state of ``step`` and begins to store it; model and optimizer may change when this returns.

        Args:
            step: optimizer steps done.
            model: sharded or plain.
            optimizer: of the model; all its state must be tensors.
            trainer_state: small JSON-able values to find again at the resume (rank 0's are kept); ``step``,
                ``world_size`` and ``versions`` are added.

        Raises:
            CheckpointError: the previous save failed, or the storage cannot be used.
        """
        started = time.monotonic()
        self.wait()
        waited = time.monotonic()
        folder = layout.step_folder(self.run_dir, step)
        save_id = on_first_worker(lambda: _clear(folder), where=folder)
        writer = HostStagingWriter(rank=self._workers.rank)
        tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp_save(tensors, storage_writer=writer, planner=planner)
        except CheckpointException as failure:
            raise single_error(failure, where=folder) from None
        world_size = self._workers.world_size
        described = {**trainer_state, "step": step, "world_size": world_size, "versions": _versions()}
        staged = StagedSave(
            folder, save_id, step, self._workers.rank, world_size, writer.chunks, writer.table, described
        )
        self._thread = threading.Thread(target=self._store, args=(staged,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        return SaveTimings(wait_s=waited - started, stage_s=time.monotonic() - waited)

    def wait(self) -> None:
        """Returns when the last save is stored, on all workers.

        Raises:
            CheckpointError: it failed, here or on another worker.
        """
        self._join()
        error, self._error = self._error, None
        raise_together(error, where=self.run_dir)

    def close(self) -> None:
        """Waits for the last save; to be called before the process ends."""
        self.wait()

    def load_newest(self, model: nn.Module, *, optimizer: Optimizer | None = None) -> dict[str, Any] | None:
        """Overwrites model and optimizer from the newest checkpoint that is complete and undamaged.

        Returns:
            Its trainer state, or None if the run has no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but each one is damaged. Training from scratch in their place would
            hide
                the loss, so that is left to the user.
            ResumeError: the newest one belongs to another model.
        """
        damage: CheckpointError | None = None
        for step in on_first_worker(lambda: _marked_steps(self.run_dir), where=self.run_dir):
            try:
                checkpoint = self._read(layout.step_folder(self.run_dir, step))
                return load_checkpoint(checkpoint, model, optimizer=optimizer)
            except CheckpointError as error:
                _log.warning("checkpoint of step %d is passed over, trying an older one: %s", step, error)
                damage = error
        if damage is not None:
            raise CheckpointError(
                "no checkpoint of the run can be loaded",
                where=layout.checkpoints_folder(self.run_dir),
                found=damage,
                fix="restore the files, or start again under another run name",
            )
        return None

    def _read(self, folder: str) -> layout.Checkpoint:
        checkpoint, error = None, None
        try:
            checkpoint = layout.read_checkpoint(folder)
        except CheckpointError as damage:
            error = damage
        raise_together(error, where=folder)
        assert checkpoint is not None
        return checkpoint

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _store(self, staged: StagedSave) -> None:
        try:
            store(staged, spool_dir=self._spool_dir, peers=self._peers)
        except CheckpointError as error:
            self._error = error
            return
        if self._workers.is_first:
            try:
                delete_expired(self.run_dir, current=staged.step, keep=self._keep)
            except Exception as error:
                _log.warning("old checkpoints could not be deleted: %r", error)


def _clear(folder: str) -> str:
    """Removes what an earlier attempt left in the folder; returns the id of the new save."""
    layout.remove_checkpoint(folder)
    return uuid.uuid4().hex


def _marked_steps(run_dir: str) -> list[int]:
    return [step for step in reversed(layout.steps_on_storage(run_dir)) if layout.has_marker(run_dir, step)]


def _versions() -> dict[str, str]:
    return {"raydist": raydist.__version__, "torch": torch.__version__, "python": platform.python_version()}
