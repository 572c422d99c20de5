"""Load of the machine, as metrics ``system/...``."""

from __future__ import annotations

import time

_GIB = 2.0**30


class SystemSampler:
    """CPU and memory of this machine and process, at most once an interval.

    Samples ride on the training records and so share their steps; reading them takes well under a millisecond.

    Args:
        interval_s: shortest time between two samples.
    """

    def __init__(self, *, interval_s: float = 10.0) -> None:
        import psutil

        self._interval_s = interval_s
        self._process = psutil.Process()
        self._cpu_percent = psutil.cpu_percent
        self._virtual_memory = psutil.virtual_memory
        self._cpu_percent()  # the first reading has no interval behind it
        self._process.cpu_percent()
        self._last = time.monotonic()

    def sample(self) -> dict[str, float]:
        """The load since the last sample, or nothing if the interval is not over."""
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return {}
        self._last = now
        memory = self._virtual_memory()
        return {
            "system/cpu_percent": self._cpu_percent(),
            "system/process_cpu_percent": self._process.cpu_percent(),
            "system/memory_percent": memory.percent,
            "system/memory_used_gib": memory.used / _GIB,
            "system/process_memory_gib": self._process.memory_info().rss / _GIB,
        }
