from __future__ import annotations

import itertools
import logging

import pytest

from raydist.core import retry as retry_module
from raydist.core.retry import GaveUp, Pauses, patience, retry


class Time:
    """A clock that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(retry_module.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(retry_module.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, num_failures: float, error: Exception) -> None:
        self.num_failures = num_failures
        self.error = error
        self.num_calls = 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise self.error
        return "answer"


def call(flaky: Flaky, *, total_s: float = 300.0) -> str:
    return retry(flaky, what="reading x", total_s=total_s, is_transient=lambda error: isinstance(error, OSError))


def test_a_passing_fault_is_waited_for_and_logged_once(clock: Time, caplog: pytest.LogCaptureFixture) -> None:
    flaky = Flaky(5, OSError("503"))
    with caplog.at_level(logging.WARNING, logger="raydist"):
        assert call(flaky) == "answer"
    assert flaky.num_calls == 6
    assert [record.getMessage().split(":")[0].split(",")[0] for record in caplog.records] == [
        "reading x fails",
        "reading x works again after 5 failures",
    ]


def test_other_errors_are_raised_at_once(clock: Time) -> None:
    flaky = Flaky(1, ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        call(flaky)
    assert (flaky.num_calls, clock.now_s) == (1, 0.0)


def test_the_whole_is_bounded_and_the_cause_is_kept(clock: Time) -> None:
    flaky = Flaky(float("inf"), OSError("refused"))
    with pytest.raises(GaveUp) as caught:
        call(flaky, total_s=60.0)
    assert 45.0 <= clock.now_s <= 60.0
    assert str(caught.value.__cause__) == "refused"
    assert flaky.num_calls < 20


def test_patience_bounds_several_calls_together(clock: Time) -> None:
    with patience(total_s=10.0):
        for _ in range(2):
            with pytest.raises(GaveUp):
                call(Flaky(float("inf"), OSError("refused")))
            assert clock.now_s <= 10.0
    call(Flaky(8, OSError("refused")))
    assert clock.now_s > 10.0


def test_pauses_grow_to_a_limit_and_differ() -> None:
    pauses = list(itertools.islice(iter(Pauses(first_s=1.0, longest_s=8.0)), 50))
    for pause, length in zip(pauses, [1.0, 2.0, 4.0, *[8.0] * 47], strict=True):
        assert length / 2 <= pause <= length
    assert len(set(pauses)) == 50


def test_the_time_counts_from_the_first_failure(clock: Time) -> None:
    """An upload of many minutes that fails at its end is tried again."""
    flaky = Flaky(1, OSError("503"))

    def upload() -> str:
        clock.now_s += 400.0
        return flaky()

    assert retry(upload, what="writing x", total_s=300.0, is_transient=lambda error: True) == "answer"
    with patience(total_s=100.0), pytest.raises(GaveUp):
        retry(Flaky(1, OSError("503")), what="writing x", total_s=300.0, is_transient=lambda error: late(clock))


def late(clock: Time) -> bool:
    clock.now_s += 400.0
    return True
