"""Who trains a run: one driver at a time, and the next one only after it is dead.

Two drivers on one run directory would train every step twice and overwrite each other's checkpoints. The driver's lease is a
small file that it rewrites every few seconds. A second driver that finds one waits to see whether it still changes, which
needs neither a lock server nor equal clocks, and works alike in a folder and in a bucket. The wait is also what the dead
driver's workers need to end. Those of a driver that is only frozen go on; they look at the lease before they write a
checkpoint, and end when it is another's.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from typing import Any

from raydist.core import storage
from raydist.core.errors import ResumeError, StorageError
from raydist.core.log import get_logger
from raydist.core.retry import patience

LEASE = "driver.json"
_BEAT_EVERY_S = 3.0
_DEAD_AFTER_S = 20.0
_CERTAINLY_DEAD_AFTER_S = 600.0
_POLL_S = 0.5
_PATIENCE_S = 10.0
_log = get_logger(__name__)


class DriverLease:
    """Holds a run directory for the length of the block.

    Args:
        run_dir: local or remote.

    Raises:
        ResumeError: on entry, another driver is alive.
    """

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._path = storage.join(run_dir, LEASE)
        self._id = uuid.uuid4().hex
        self._count = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="raydist-lease", daemon=True)

    def is_held(self) -> bool:
        """Whether the run is still this driver's; a driver that was frozen may have lost it."""
        return is_held(self._run_dir, self._id)

    def __enter__(self) -> DriverLease:
        self._wait_for_death()
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            with patience(total_s=_PATIENCE_S):
                if self._read().get("id") == self._id:
                    self._beat(ended=True)
        except Exception as trouble:  # an unreachable bucket; the next driver waits a little
            _log.warning("the driver's lease could not be given back: %r", trouble)

    def _wait_for_death(self) -> None:
        """Returns when there is no lease, or it has not changed for long enough."""
        first = self._read()
        deadline = time.monotonic() + _DEAD_AFTER_S
        if _is_free(first):
            return
        _log.warning("another driver had this run; waiting %.0f s to see whether it is alive", _DEAD_AFTER_S)
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            current = self._read()
            if _is_free(current):
                return
            if current != first:
                raise self._refusal(current)

    def _refusal(self, holder: dict[str, Any]) -> ResumeError:
        return ResumeError(
            "another driver is training this run",
            where=self._run_dir,
            found=f"process {holder.get('pid')} on {holder.get('host')}, alive",
            expected="one driver for each run",
            fix=f"watch it: raydist status {os.path.basename(self._run_dir)}\nor stop it, or give this run another name",
        )

    def _read(self) -> dict[str, Any]:
        return _lease_of(self._run_dir)

    def _beat(self, *, ended: bool = False) -> None:
        self._count += 1
        holder = {"id": self._id, "host": socket.gethostname(), "pid": os.getpid()}
        storage.write_json(self._path, {**holder, "time": time.time(), "beat": self._count, "ended": ended})

    def _keep(self) -> None:
        while not self._ended.wait(_BEAT_EVERY_S):
            try:
                with patience(total_s=_PATIENCE_S):
                    holder = self._read()
                    if not holder:  # the run's directory was taken back
                        return
                    if holder.get("id") != self._id:
                        _log.error("another driver has taken this run over, because this one was silent for too long")
                        _interrupt_at_once()
                        return
                    self._beat()
            except Exception as error:  # the run itself decides whether it can live without its storage
                _log.warning("the driver's lease could not be renewed: %r", error)


def holder_of(run_dir: str) -> str | None:
    """The id of the driver that has the run; None where there is none."""
    holder = _lease_of(run_dir).get("id")
    return holder if isinstance(holder, str) else None


def is_held(run_dir: str, holder: str | None) -> bool:
    """Whether a driver still has its run. An unreachable storage leaves it the run: nothing can be written there anyway."""
    try:
        with patience(total_s=_PATIENCE_S):
            return holder is None or holder_of(run_dir) in (holder, None)
    except (StorageError, OSError):
        return True


def _lease_of(run_dir: str) -> dict[str, Any]:
    """The lease; empty where there is none, or where it is being written."""
    try:
        lease = storage.read_json(storage.join(run_dir, LEASE))
    except (FileNotFoundError, ValueError):
        return {}
    return lease if isinstance(lease, dict) else {}


def _is_free(lease: dict[str, Any]) -> bool:
    """True where nobody holds it, or its holder was last seen so long ago that unequal clocks do not matter."""
    seen = lease.get("time")
    if not lease or lease.get("ended") or not isinstance(seen, int | float):
        return True
    return time.time() - seen > _CERTAINLY_DEAD_AFTER_S


def _interrupt_at_once() -> None:
    """As if Ctrl-C had been pressed twice: the first one asks for a saved end, which is the other driver's affair now.

    A shell script starts a command behind ``&`` with Ctrl-C ignored; such a process is terminated instead.
    """
    is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM if is_deaf else signal.SIGINT)
        time.sleep(1.0)  # signals that are too close to each other arrive as one
