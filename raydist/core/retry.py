"""Repeats calls to a server that is away for a while, with growing, jittered pauses and a bound on the whole."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from raydist.core.log import get_logger
from raydist.core.units import format_duration

_log = get_logger(__name__)
_deadlines = threading.local()
_T = TypeVar("_T")


@dataclass(frozen=True)
class Pauses:
    """Pauses between attempts: doubled each time up to a limit, then drawn evenly from their upper half.

    Attributes:
        first_s: length of the first one.
        longest_s: no pause is longer.
    """

    first_s: float = 0.2
    longest_s: float = 15.0

    def __iter__(self) -> Iterator[float]:
        length_s = self.first_s
        while True:
            yield length_s * random.uniform(0.5, 1.0)
            length_s = min(2 * length_s, self.longest_s)


class GaveUp(Exception):
    """The server did not recover in time; the cause is the last error."""

    def __init__(self, *, num_attempts: int, waited_s: float) -> None:
        super().__init__(f"{num_attempts} attempts in {format_duration(waited_s)}")


@contextmanager
def patience(*, total_s: float) -> Iterator[None]:
    """Bounds all retries of this thread inside the block together, whatever each call would allow itself."""
    before = getattr(_deadlines, "at", None)
    own = time.monotonic() + total_s
    _deadlines.at = own if before is None else min(before, own)
    try:
        yield
    finally:
        _deadlines.at = before


def retry(
    call: Callable[[], _T],
    *,
    what: str,
    total_s: float,
    is_transient: Callable[[Exception], bool],
    pauses: Pauses | None = None,
) -> _T:
    """The result of ``call``, repeated while it fails in a way that may pass.

    Args:
        call: must be harmless to repeat.
        what: for the log, e.g. ``reading s3://...``; the first failure is logged, and the recovery.
        total_s: no attempt begins later than this after the first failure, nor after the end of :func:`patience`.
        is_transient: whether an error may pass; all others are raised at once.
        pauses: between attempts.

    Raises:
        GaveUp: the time is over.
    """
    started = time.monotonic()
    deadline = getattr(_deadlines, "at", None) or float("inf")
    for num_failed, pause_s in enumerate(pauses or Pauses()):
        try:
            result = call()
        except Exception as error:
            if not is_transient(error):
                raise
            now = time.monotonic()
            if num_failed == 0:
                deadline = min(now + total_s, deadline)
            if now + pause_s > deadline:
                raise GaveUp(num_attempts=num_failed + 1, waited_s=now - started) from error
            if num_failed == 0:
                _log.warning("%s fails, trying again for %s: %s", what, format_duration(deadline - now), error)
            time.sleep(pause_s)
        else:
            if num_failed:
                _log.warning("%s works again after %d failures", what, num_failed)
            return result
    raise AssertionError("pauses never end")
