"""Memory of the host between steps."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**31 - 1
_LARGEST_HEAP_BLOCK_BYTES = 2**30


def keep_freed_memory() -> None:
    """Lets the process keep what it frees instead of returning it to the kernel.

    A step on the CPU frees all its activations and the next one needs as many. By default glibc gives large blocks back,
    and the kernel then hands out, and zeroes, the same pages again in each step: up to a tenth of a step. Does nothing
    where the C library has no ``mallopt``. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK_BYTES)
