"""Waiting for a job over a connection that drops."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from raydist.core.errors import ClusterError
from raydist.runtime import jobs as module
from raydist.runtime.jobs import JobsApi


def dropped() -> list[Any]:
    raise ConnectionError("port-forward: connection refused")


def listing(status: str) -> Callable[[], list[Any]]:
    job = SimpleNamespace(
        submission_id="raydist-x", status=status, message=None, metadata=None, start_time=1, end_time=None
    )
    return lambda: [job]


@pytest.fixture
def api_that(monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobsApi]:
    """Answers each poll by the next of these, and all further ones by the last."""
    monkeypatch.setattr(module, "_POLL_S", 0.0)

    def api(*answers: Callable[[], list[Any]]) -> JobsApi:
        left = list(answers)
        made = object.__new__(JobsApi)  # connected to nothing
        made.address = "http://h:8265"
        made._client = SimpleNamespace(list_jobs=lambda: (left.pop(0) if len(left) > 1 else left[0])())
        return made

    return api


def test_a_wait_outlives_polls_that_fail(api_that: Callable[..., JobsApi]) -> None:
    api = api_that(listing("RUNNING"), dropped, dropped, listing("RUNNING"), dropped, listing("STOPPED"))
    ended = api.wait("raydist-x", timeout_s=60)
    assert ended is not None
    assert ended.status == "STOPPED"


def test_a_job_that_runs_on_is_no_error(api_that: Callable[..., JobsApi]) -> None:
    assert api_that(dropped, listing("RUNNING")).wait("raydist-x", timeout_s=0.05) is None


def test_whether_a_job_ended_is_not_known_at_the_end_of_the_time(api_that: Callable[..., JobsApi]) -> None:
    with pytest.raises(ClusterError, match="does not answer"):
        api_that(listing("RUNNING"), dropped).wait("raydist-x", timeout_s=0.05)


def test_a_long_outage_ends_a_long_wait(api_that: Callable[..., JobsApi], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OUTAGE_S", 0.05)
    with pytest.raises(ClusterError, match="does not answer"):
        api_that(listing("RUNNING"), dropped).wait("raydist-x", timeout_s=3600)
