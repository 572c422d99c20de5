import pytest

from raydist.checkpoint.retention import expired_steps


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


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ValueError, match="newest"):
        expired_steps([10], [], current=10, keep=0)
