"""Signals of the driver: the first one asks for a saved end, the second one ends at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Catches SIGTERM (what ``ray job stop`` and Kubernetes send) and Ctrl-C inside the block.

    Outside of the main thread, where Python gives no signals, it does nothing.

    Args:
        grace_s: how long after the first signal :meth:`raise_if_overdue` stays patient.
    """

    def __init__(self, *, grace_s: float) -> None:
        self._grace_s = grace_s
        self._received: tuple[signal.Signals, float] | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Which signal came, or None."""
        return self._received[0].name if self._received else None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_if_overdue(self) -> None:
        """Raises KeyboardInterrupt when the grace after the first signal is over."""
        if self._received and time.monotonic() > self._received[1] + self._grace_s:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = (signal.Signals(number), time.monotonic())
