"""Saves and resumes of one run.

A save blocks for its plan only. A thread copies the planned tensors to host memory, while the next forward and backward
run, and stores the copy (:mod:`raydist.checkpoint.store`); the next update waits until the copy is there. One save is in
flight at most: the next one waits for it. All waits are reported. A save that cannot be stored is a warning and leaves the
older checkpoints as they are; only the last one of a run is an error.
"""

from __future__ import annotations

import platform
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.optim import Optimizer

import raydist
from raydist.checkpoint import layout
from raydist.checkpoint.agreement import on_any_worker, on_first_worker, single_error
from raydist.checkpoint.load import load_checkpoint
from raydist.checkpoint.retention import delete_expired
from raydist.checkpoint.staging import Copying, HostBuffers, HostStagingWriter
from raydist.checkpoint.state import model_tensors, optimizer_tensors
from raydist.checkpoint.store import PeerWait, StagedSave, clear_spool, store
from raydist.config.schema import KeepBestConfig
from raydist.core import storage
from raydist.core.dist import Workers
from raydist.core.errors import CheckpointError, ResumeError, StorageError
from raydist.core.log import get_logger

_GRACE_AFTER_ERROR_S = 10.0
_FIRST_POLL_S, _LAST_POLL_S = 0.01, 1.0
_log = get_logger(__name__)


@dataclass(frozen=True)
class SaveTimings:
    """What one save cost the training loop.

    Attributes:
        wait_s: time until the previous save was stored.
        stage_s: time to plan who stores what.
    """

    wait_s: float
    stage_s: float


@dataclass(frozen=True)
class SaveResult:
    """How a save ended, as far as this worker knows; what rank 0 knows holds for all.

    Attributes:
        step: of the save.
        upload_s: time from the plan to the end.
        held_s: time for which the next update waited for the copy to host memory.
        error: why it was not stored, or None.
    """

    step: int
    upload_s: float
    held_s: float
    error: CheckpointError | None


class Checkpointer:
    """All workers construct it and call its methods together.

    Args:
        run_dir: the run's folder, local (shared by all workers) or in a bucket.
        keep: newest complete checkpoints kept.
        keep_every_steps: those of multiples of this step are kept for good.
        keep_best: the best one by this metric of ``trainer_state["validation"]`` is kept as well.
        workers: who this process is.
        spool_dir: node-local folder for shards on their way to a bucket; default: below the system's temporary folder.
        peer_timeout_s: how long rank 0 waits for the other workers' shards before the save counts as failed.
        before_marker: called on rank 0, in the thread that stores, before a checkpoint becomes complete.
        is_ours: whether the run is still ours, asked in the thread before anything is written and before the marker. When it
            is not, nothing more is written, and the next call ends in a :class:`~raydist.core.errors.ResumeError`.

    Attributes:
        passed_over: what :meth:`load_newest` found damaged, a sentence each.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        keep: int,
        workers: Workers,
        keep_every_steps: int | None = None,
        keep_best: KeepBestConfig | None = None,
        spool_dir: str | None = None,
        peer_timeout_s: float = 1800.0,
        before_marker: Callable[[], None] | None = None,
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        self.run_dir = storage.normalize(run_dir)
        self._keep = keep
        self._keep_every_steps = keep_every_steps
        self._keep_best = keep_best
        self._workers = workers
        self._spool_dir = spool_dir
        self._peer_timeout_s = peer_timeout_s
        self._before_marker = before_marker
        self._is_ours = is_ours
        self.passed_over: list[str] = []
        self._taken_over = False
        self._peers = PeerWait(timeout_s=peer_timeout_s)
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._results: deque[SaveResult] = deque()
        self._steps_in_use: set[int] | None = None
        self._copying: Copying | None = None
        self._watched: Optimizer | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._peers.shorten(timeout_s=_GRACE_AFTER_ERROR_S)
        if self._thread is not None:
            self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether this worker still stores a save; rank 0 does until all workers are done."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether this worker could not store its part of the last save."""
        return self._error is not None and not self.busy

    def take_results(self) -> list[SaveResult]:
        """The saves that ended since the last call."""
        return [self._results.popleft() for _ in range(len(self._results))]

    def save(
        self, step: int, *, model: nn.Module, optimizer: Optimizer, trainer_state: Mapping[str, Any]
    ) -> SaveTimings:
        """Plans the save of ``step`` and begins it. ``optimizer.step()`` waits for the copy to host memory by itself;

        whoever changes model or optimizer in another way calls :meth:`wait_until_copied` before.

        Args:
            step: optimizer steps done.
            model: sharded or plain.
            optimizer: of the model; all its state must be tensors.
            trainer_state: small JSON-able values to find again at the resume (rank 0's are kept); ``step``,
                ``world_size`` and ``versions`` are added.

        A save that fails, now or later, is logged and seen in :meth:`take_results`.
        """
        started = time.monotonic()
        self._settle()
        waited = time.monotonic()
        folder = layout.step_folder(self.run_dir, step)
        try:
            save_id = on_first_worker(lambda: self._claim(step), where=folder)
        except StorageError as error:
            self._end(
                step, since=waited, held_s=0.0, error=CheckpointError(error.what, where=error.where, found=error.found)
            )
            return SaveTimings(wait_s=waited - started, stage_s=0.0)
        staged = self._stage(step, folder, save_id, model, optimizer, trainer_state)
        self._error, self._peers = None, PeerWait(timeout_s=self._peer_timeout_s)
        copying = Copying()
        if optimizer is not self._watched:
            optimizer.register_step_pre_hook(lambda *unused: self.wait_until_copied())
            self._watched = optimizer
        arguments = (staged, copying, self._computed())
        thread = threading.Thread(target=self._store, args=arguments, name=f"checkpoint-{step}", daemon=True)
        thread.start()
        self._thread, self._copying = thread, copying
        return SaveTimings(wait_s=waited - started, stage_s=time.monotonic() - waited)

    def _stage(
        self,
        step: int,
        folder: str,
        save_id: str,
        model: nn.Module,
        optimizer: Optimizer,
        trainer_state: Mapping[str, Any],
    ) -> StagedSave:
        """This worker's part, where it is. A collective."""
        writer = HostStagingWriter(rank=self._workers.rank)
        tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp_save(tensors, storage_writer=writer, planner=planner)
        except CheckpointException as failure:
            raise single_error(failure, where=folder) from None
        world_size = self._workers.world_size
        described = {**trainer_state, "step": step, "world_size": world_size, "versions": _versions()}
        return StagedSave(folder, save_id, step, self._workers.rank, world_size, writer.chunks, writer.table, described)

    def _computed(self) -> torch.cuda.Event | None:
        """On a GPU: when it has computed what it was told so far."""
        if self._workers.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._workers.device))
        return event

    def wait_until_copied(self) -> None:
        """Returns when model and optimizer may change; at once where no save is in flight."""
        if self._copying is not None:
            self._copying.wait()

    def wait(self) -> None:
        """Returns when the last save is stored, on all workers.

        Raises:
            CheckpointError: it failed, here or on another worker.
            ResumeError: the run is not ours any more.
        """
        failed = self._settle()
        if failed:
            raise self._error or CheckpointError(
                "another worker could not store its part of the last checkpoint; its own log says why",
                where=self.run_dir,
            )

    def close(self) -> None:
        """Waits for the last save; to be called before the process ends.

        Raises:
            CheckpointError: it failed, here or on another worker.
        """
        self.wait()

    def _settle(self) -> bool:
        """Waits until no worker has a save in flight; returns whether the last one failed on any.

        The workers ask each other again and again, since a save may take longer than a collective may.
        """
        poll_s = _FIRST_POLL_S
        while True:
            if self._thread is not None:
                self._thread.join(poll_s)
            is_busy, has_failed, taken_over = on_any_worker(self.busy, self._error is not None, self._taken_over)
            if taken_over:
                raise self._loss()
            if has_failed:
                self._peers.shorten(timeout_s=0.0)
            if not is_busy:
                return has_failed
            poll_s = min(2 * poll_s, _LAST_POLL_S)

    def load_newest(self, model: nn.Module, *, optimizer: Optimizer | None = None) -> dict[str, Any] | None:
        """Overwrites model and optimizer from the newest checkpoint that is complete and undamaged.

        Returns:
            Its trainer state, or None if the run has no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but each one is damaged. Training from scratch in their place would
                hide the loss, so that is left to the user.
            ResumeError: the newest one belongs to another model.
            StorageError: the storage cannot be used.
        """
        if self._workers.local_rank == 0 and storage.is_remote(self.run_dir):
            clear_spool(self.run_dir, spool_dir=self._spool_dir)
        damage: CheckpointError | None = None
        for step in on_first_worker(self._marked_steps, where=self.run_dir):
            try:
                checkpoint = self._read(layout.step_folder(self.run_dir, step))
                return load_checkpoint(checkpoint, model, optimizer=optimizer)
            except CheckpointError as error:
                self.passed_over.append(f"checkpoint of step {step} is passed over, trying an older one: {error}")
                _log.warning(self.passed_over[-1])
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
        """Rank 0 looks at the files, so that their number of requests does not grow with the number of workers."""
        answer = on_first_worker(lambda: _marker_or_damage(folder), where=folder)
        if "damage" in answer:
            raise CheckpointError(**answer["damage"])
        return layout.checkpoint_from_json(answer["marker"], folder=folder)

    def _marked_steps(self) -> list[int]:
        """Newest first. Rank 0 only; later saves then know without the storage which folders there are."""
        steps = layout.steps_on_storage(self.run_dir)
        self._steps_in_use = set(steps)
        return [step for step in reversed(steps) if layout.has_marker(self.run_dir, step)]

    def _claim(self, step: int) -> str:
        """Removes what an earlier attempt left in the step's folder; returns the id of the new save. Rank 0 only."""
        if self._steps_in_use is None:
            self._steps_in_use = set(layout.steps_on_storage(self.run_dir))
        if step in self._steps_in_use:
            if not self._is_ours():
                self._taken_over = True
                raise self._loss()
            layout.remove_checkpoint(layout.step_folder(self.run_dir, step))
        self._steps_in_use.add(step)
        return uuid.uuid4().hex

    def _store(self, staged: StagedSave, copying: Copying, computed: torch.cuda.Event | None) -> None:
        started = time.monotonic()
        if computed is not None:  # a new thread's device is the first one of the node
            torch.cuda.set_device(self._workers.device)
        try:
            store(
                staged,
                to_host=lambda tensors: self._copy(tensors, copying, computed),
                spool_dir=self._spool_dir,
                peers=self._peers,
                before_marker=self._last_check,
            )
        except ResumeError as error:
            self._taken_over = True
            lost = CheckpointError(error.what, where=error.where)
            self._end(staged.step, since=started, held_s=copying.held_s, error=lost)
            return
        except CheckpointError as error:
            self._end(staged.step, since=started, held_s=copying.held_s, error=error)
            return
        self._end(staged.step, since=started, held_s=copying.held_s, error=None)
        if self._workers.is_first:
            try:
                delete_expired(
                    self.run_dir,
                    current=staged.step,
                    keep=self._keep,
                    keep_every_steps=self._keep_every_steps,
                    keep_best=self._keep_best,
                )
            except Exception as error:
                _log.warning("old checkpoints could not be deleted: %r", error)

    def _copy(
        self, tensors: Mapping[str, Tensor], copying: Copying, computed: torch.cuda.Event | None
    ) -> dict[str, Tensor]:
        try:
            copies = self._buffers.copy(tensors, after=computed)
        finally:
            copying.end()
        self._require_ours()
        return copies

    def _last_check(self) -> None:
        self._require_ours()
        if self._before_marker is not None:
            self._before_marker()

    def _require_ours(self) -> None:
        if not self._is_ours():
            raise self._loss()

    def _loss(self) -> ResumeError:
        return ResumeError(
            "another driver has taken this run over, because this one's was silent for too long",
            where=self.run_dir,
            fix="nothing is lost: the other one goes on from the newest checkpoint",
        )

    def _end(self, step: int, *, since: float, held_s: float, error: CheckpointError | None) -> None:
        self._error = error
        if error is not None:
            _log.warning("the checkpoint of step %d is not stored, the older ones stay valid: %s", step, error)
        self._results.append(SaveResult(step, time.monotonic() - since, held_s, error))


def _marker_or_damage(folder: str) -> dict[str, Any]:
    try:
        return {"marker": layout.read_checkpoint(folder).to_json()}
    except CheckpointError as damage:
        return {"damage": damage.fields()}


def _versions() -> dict[str, str]:
    return {"raydist": raydist.__version__, "torch": torch.__version__, "python": platform.python_version()}
