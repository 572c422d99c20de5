import pytest

from raydist.checkpoint.retention import expired_steps
from raydist.checkpoint.schedule import SaveSchedule


@pytest.mark.parametrize(
    ("complete", "incomplete", "current", "keep", "expired"),
    [
        ([10], [], 10, 1, []),
        ([10, 20], [], 20, 1, [10]),
        ([10, 20], [], 20, 2, []),
        ([10, 20, 30, 40], [], 40, 2, [10, 20]),
        ([40, 10, 30, 20], [], 40, 3, [10]),
        ([10, 20], [15, 25], 20, 2, [15, 25]),
        ([10, 20], [5, 25], 20, 1, [5, 10, 25]),
        # The run went back from a damaged 30 to 10 and saved 20: 30 is not of its course any more.
        ([10, 20, 30], [], 20, 2, [30]),
        ([10, 20, 30], [], 20, 1, [10, 30]),
        ([20, 30, 40], [], 20, 5, [30, 40]),
    ],
)
def test_table(complete: list[int], incomplete: list[int], current: int, keep: int, expired: list[int]) -> None:
    assert expired_steps(complete, incomplete, current=current, keep=keep) == expired


@pytest.mark.parametrize(
    ("complete", "current", "keep", "keep_every_steps", "expired"),
    [
        ([10, 20, 30, 40], 40, 1, 20, [10, 30]),
        ([10, 20, 30, 40, 50], 50, 2, 20, [10, 30]),
        ([100, 137, 200, 251], 251, 1, 100, [137]),
        ([100, 137, 200, 251], 251, 2, 100, [137]),
        ([10, 20, 30], 30, 1, 1, []),
        # Kept for good means of this course: 40 was left behind when the run went back to 20.
        ([20, 30, 40], 30, 1, 20, [40]),
    ],
)
def test_some_are_kept_for_good(
    complete: list[int], current: int, keep: int, keep_every_steps: int, expired: list[int]
) -> None:
    found = expired_steps(complete, [], current=current, keep=keep, keep_every_steps=keep_every_steps)
    assert found == expired


def test_a_course_of_saves_by_steps_and_by_time_leaves_what_was_promised() -> None:
    clock_s = 0.0
    schedule = SaveSchedule(every_steps=None, every_minutes=1.0, keep_every_steps=50, clock=lambda: clock_s)
    stored: list[int] = []
    for step in range(1, 121):
        clock_s += 7.0
        if schedule.names(step) or schedule.is_overdue():
            schedule.restart()
            expired = expired_steps([*stored, step], [], current=step, keep=2, keep_every_steps=50)
            stored = [kept for kept in [*stored, step] if kept not in expired]
    # Every 9 steps are 63 s; the saves at 50 and 100 start the clock anew.
    assert stored == [50, 100, 109, 118]


def test_a_schedule_without_periods_names_no_step() -> None:
    schedule = SaveSchedule(every_steps=None, every_minutes=None, keep_every_steps=None, clock=lambda: 1e9)
    assert not any(schedule.names(step) for step in range(1, 100))
    assert not schedule.is_overdue()


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ValueError, match="newest"):
        expired_steps([10], [], current=10, keep=0)
