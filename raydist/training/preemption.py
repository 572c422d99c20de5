"""Notices that this process is about to be ended, and what all ranks make of them at a step boundary.

A notice is best effort; what a lost worker costs at most is decided by ``checkpoint.every_minutes``. It may come to one rank
only, and ranks that act on their own hang the others, so wishes travel with the sum over ranks that begins every step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from raydist.core.log import get_logger

Notice = Callable[[], str | None]
"""Says why this process should save and end soon, or None. Asked at every step: answers at once, and never takes it back."""

_log = get_logger(__name__)


class StopNotice:
    """Several sources of notices as one; remembers the first.

    Args:
        sources: asked in this order.
    """

    def __init__(self, *sources: Notice) -> None:
        self._sources = sources
        self._reason: str | None = None

    def __call__(self) -> str | None:
        """The reason to stop, or None."""
        if self._reason is None:
            self._reason = next((reason for source in self._sources if (reason := source())), None)
            if self._reason is not None:
                _log.warning("%s: saving and ending at the next step boundary", self._reason)
        return self._reason


@contextmanager
def sigterm_notice() -> Iterator[Notice]:
    """SIGTERM as a notice while the block runs; later ones change nothing, SIGKILL still ends the process.

    Signals reach the main thread only, so elsewhere (in a Ray Train worker) this never gives notice.
    """
    received: list[str] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(f"received {signal.Signals(number).name}")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda: received[0] if received else None
    finally:
        signal.signal(signal.SIGTERM, before)


class Ballot:
    """The sum over ranks of each rank's wishes, on its way to the host.

    On a GPU the copy is queued behind the sum with which the step begins, not behind the step: reading it at the step's end
    waits for the device to reach the step, while the rest of the step is queued.
    """

    def __init__(self, sums: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = sums
        if sums.is_cuda:
            self._host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[bool]:
        """For each wish, whether any rank has it; the same on all ranks."""
        if self._event is not None:
            self._event.synchronize()
        return [value > 0 for value in self._host.tolist()]


def wishes(*values: bool) -> Sequence[float]:
    """A rank's wishes as numbers to be summed."""
    return [float(value) for value in values]
