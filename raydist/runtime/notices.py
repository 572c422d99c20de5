"""What asks a worker to save and to end its attempt."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.v2._internal.execution.context import get_train_context

_ASK_EVERY_S = 1.0


class StopNotices:
    """Called between steps on every worker; returns the reason to stop, or None, without waiting for anybody.

    Two senders: Ray, when a node of the run is being drained, which every worker is told; and the driver, through the
    monitor, which rank 0 asks once a second. ``ray.train.get_preemption_info`` is not called, because it is a barrier over
    all workers; what it would return is read from where Ray keeps it. That is internal to Ray, hence the pinned version
    and the test that drains a node.

    Args:
        monitor: actor handle of a :class:`raydist.runtime.monitor.RunMonitor`.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._context = get_train_context()
        self._asks = self._context.get_world_rank() == 0
        self._reason: str | None = None
        self._answer: Any = None
        self._ask_at = 0.0

    def __call__(self) -> str | None:
        """Why this attempt should end."""
        if self._context.preemption_context.preemption_info is not None:
            return "a node of the run is being taken away"
        return self._requested() if self._asks else None

    def _requested(self) -> str | None:
        """What the monitor has answered so far; once a second the answer is looked at and the next question sent."""
        if self._reason is not None or time.monotonic() < self._ask_at:
            return self._reason
        self._ask_at = time.monotonic() + _ASK_EVERY_S
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._reason, self._answer = ray.get(self._answer), None
        if self._reason is None and self._answer is None:
            self._answer = self._monitor.stop_reason.remote()
        return self._reason
