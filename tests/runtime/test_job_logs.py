"""Following a log over connections that break: every character once, and an end."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import AsyncIterator

import pytest

from raydist.core.errors import ClusterError
from raydist.runtime import job_logs
from raydist.runtime.job_logs import follow
from raydist.runtime.jobs import Job

RUNNING = Job("raydist-x", "RUNNING", None, "x", None, None, 1, 3.0, None, None)
LOG = "".join(f"line {number} é\n" for number in range(200))


class Cluster:
    """Answers like the jobs API: each stream begins with the first character, and most break somewhere."""

    address = "http://127.0.0.1:8265"

    def __init__(self, seed: int, *, num_failures: int = 0) -> None:
        self.random = random.Random(seed)
        self.num_streams = 0
        self.num_failures = num_failures
        self.written = 0

    def job(self, job_id: str) -> Job | None:
        if self.num_failures > 0:
            self.num_failures -= 1
            raise ClusterError("the cluster's jobs API does not answer", found="refused")
        status = "SUCCEEDED" if self.written >= len(LOG) else "RUNNING"
        return dataclasses.replace(RUNNING, status=status) if job_id == RUNNING.job_id else None

    def log(self, job_id: str) -> str:
        return LOG

    async def stream(self, job_id: str) -> AsyncIterator[str]:
        self.num_streams += 1
        self.written = min(len(LOG), self.written + self.random.randrange(1, 600))
        end, sent = self.random.randrange(self.written + 1), 0
        while sent < end:
            piece = LOG[sent : min(end, sent + self.random.randrange(1, 50))]
            sent += len(piece)
            yield piece
        if self.random.random() < 0.8:
            raise self.random.choice([ConnectionResetError("cut"), RuntimeError("WebSocket closed")])


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "_FIRST_DELAY_S", 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_every_character_once(seed: int) -> None:
    cluster, pieces, reasons = Cluster(seed), [], []
    num_chars = follow(cluster, "raydist-x", write=pieces.append, on_reconnect=reasons.append)
    assert "".join(pieces) == LOG
    assert num_chars == len(LOG)
    assert cluster.num_streams > 3
    assert set(reasons) <= {"ConnectionResetError: cut", "RuntimeError: WebSocket closed"}


def test_an_api_that_is_away_for_a_while_is_waited_for() -> None:
    pieces: list[str] = []
    reasons: list[str] = []
    follow(Cluster(0, num_failures=3), "raydist-x", write=pieces.append, on_reconnect=reasons.append)
    assert "".join(pieces) == LOG
    assert reasons[:3] == ["refused"] * 3


def test_an_api_that_stays_away_is_given_up() -> None:
    with pytest.raises(ClusterError, match="does not answer"):
        follow(Cluster(0, num_failures=10**9), "raydist-x", write=lambda text: None, patience_s=0.0)


def test_a_job_that_is_gone() -> None:
    with pytest.raises(ClusterError, match="no such job"):
        follow(Cluster(0), "raydist-y", write=lambda text: None)


def test_a_silent_connection_is_replaced() -> None:
    class Silent(Cluster):
        async def stream(self, job_id: str) -> AsyncIterator[str]:
            import asyncio

            self.num_streams += 1
            yield LOG[:10]
            if self.num_streams > 2:
                self.written = len(LOG)
                return
            await asyncio.sleep(3600)

    cluster, pieces = Silent(0), []
    follow(cluster, "raydist-x", write=pieces.append, silence_s=0.05)
    assert cluster.num_streams == 3
    assert "".join(pieces) == LOG
