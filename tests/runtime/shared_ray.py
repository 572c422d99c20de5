"""The Ray that tests share, so that each does not wait for one of its own."""

from __future__ import annotations

import time
import warnings
from contextlib import ExitStack

_PATIENCE_S = 30.0


class SharedRay:
    """Starts when a test first needs it, and anew if a test before has left it in use: one failure stays one failure."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def begin(self) -> None:
        """Returns with all CPUs free."""
        import ray

        from raydist.runtime.cluster import connected

        if ray.is_initialized() and not _is_free():
            warnings.warn("a test before left CPUs of the shared Ray in use; it is started anew", stacklevel=2)
            self.stop()
        if not ray.is_initialized():
            self._stack.enter_context(connected(address=None, min_cpus=2))

    def stop(self) -> None:
        """Ends the cluster."""
        self._stack.close()


def _is_free() -> bool:
    import ray

    end = time.monotonic() + _PATIENCE_S
    while ray.available_resources().get("CPU", 0.0) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
