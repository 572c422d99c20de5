"""Workers that one trial of a sweep has left in good order, for the next trial of the same shape.

A worker is a process that imports torch, and Ray Train adds processes of its own for each group of workers: seconds, for
trials that may last no longer. Everything that a trial makes in a worker goes with it: the process group, the model, the
context of Ray Train. Only imports, compiled kernels and the place in the cluster stay.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

# Long enough for a busy driver to hand out the next trial; short enough that others get what nobody uses.
KEEP_S = 15.0

Group = TypeVar("Group")


class SpareWorkers(Generic[Group]):
    """Keeps at most one group of workers for a moment.

    Args:
        release: ends a group's processes and gives its place in the cluster back.
        keep_s: what nobody took by then is released.
    """

    def __init__(self, release: Callable[[Group], None], *, keep_s: float = KEEP_S) -> None:
        self._release = release
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._kept: tuple[object, Group] | None = None
        self._timer: threading.Timer | None = None

    def put(self, group: Group, *, shape: object) -> None:
        """Keeps a group; releases the one before, if it is still here."""
        self.release()
        with self._lock:
            self._kept = (shape, group)
            self._timer = threading.Timer(self._keep_s, self.release)
            self._timer.daemon = True
            self._timer.start()

    def take(self, *, shape: object) -> Group | None:
        """The group, if its shape is this one; a group of another shape is released, as its place may be needed."""
        kept = self._pop()
        if kept is None:
            return None
        if kept[0] == shape:
            return kept[1]
        self._release(kept[1])
        return None

    def release(self) -> None:
        """Ends what is kept."""
        kept = self._pop()
        if kept is not None:
            self._release(kept[1])

    def _pop(self) -> tuple[object, Group] | None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            kept, self._kept = self._kept, None
            return kept


def forget_trial() -> None:
    """Runs in a worker between two trials: the process group and all memory of the first one go."""
    import torch
    import torch.distributed as torch_dist

    from raydist.core.dist import leave_process_group

    if torch_dist.is_initialized():
        leave_process_group()
    if "torch._dynamo" in sys.modules:  # it counts compilations by code, not by model, and gives up after a few
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
