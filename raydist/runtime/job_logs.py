"""A job's log, line by line as it grows, over a connection that may break at any moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import aiohttp

from raydist.core.errors import ClusterError
from raydist.runtime.jobs import JobsApi

# Ray sends nothing while a job is silent, so a dead connection cannot be told from a quiet job: it is made anew.
SILENCE_S = 60.0
_FIRST_DELAY_S, _LAST_DELAY_S = 0.5, 10.0


def follow(
    api: JobsApi,
    job_id: str,
    *,
    write: Callable[[str], None],
    on_reconnect: Callable[[str], None] = lambda reason: None,
    patience_s: float = 600.0,
    silence_s: float = SILENCE_S,
) -> int:
    """Writes the whole log and what is added to it, each character once, until the job ends.

    Ray sends a log from its beginning each time it is asked; what was written already is counted and skipped.

    Args:
        api: the cluster.
        job_id: of the job.
        write: takes pieces of text, which need not be whole lines.
        on_reconnect: told why, each time a connection is replaced.
        patience_s: without any answer for so long, gives up.
        silence_s: a connection that sends nothing for so long is replaced.

    Returns:
        Characters written.

    Raises:
        ClusterError: the job does not exist, or the cluster does not answer for ``patience_s``.
    """
    tail = _Tail(api, job_id, write, silence_s=silence_s)
    delay_s, answered_at = _FIRST_DELAY_S, time.monotonic()
    while True:
        before = tail.num_written
        reason = asyncio.run(tail.read())
        if tail.num_written > before:
            delay_s, answered_at = _FIRST_DELAY_S, time.monotonic()
        try:
            job = api.job(job_id)
            log = api.log(job_id) if job is not None and job.has_ended else None
        except ClusterError as error:
            if time.monotonic() - answered_at > patience_s:
                raise
            reason = error.found or error.what
        else:
            answered_at = time.monotonic()
            if job is None:
                raise ClusterError("no such job on the cluster", where=api.address, found=job_id)
            if log is not None:
                tail.finish(log)
                return tail.num_written
        if reason is not None:
            on_reconnect(reason)
        time.sleep(delay_s)
        delay_s = min(2 * delay_s, _LAST_DELAY_S)


class _Tail:
    """What was written of one log, and the connection that brings more."""

    def __init__(self, api: JobsApi, job_id: str, write: Callable[[str], None], *, silence_s: float) -> None:
        self._api = api
        self._job_id = job_id
        self._write = write
        self._silence_s = silence_s
        self.num_written = 0

    async def read(self) -> str | None:
        """Writes what one connection brings; returns why it broke, None where it was closed in order or only silent."""
        received = 0
        pieces: AsyncIterator[str] = self._api.stream(self._job_id)
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(anext(pieces), self._silence_s)
                except (StopAsyncIteration, TimeoutError):
                    return None
                self._take(piece, offset=received)
                received += len(piece)
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    def finish(self, log: str) -> None:
        """Writes what the log has beyond the last piece that came."""
        self._take(log, offset=0)

    def _take(self, piece: str, *, offset: int) -> None:
        new = piece[max(0, self.num_written - offset) :]
        if new:
            self._write(new)
            self.num_written += len(new)
