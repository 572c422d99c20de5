from __future__ import annotations

import pytest

from raydist.core.errors import ConfigError
from raydist.core.units import format_bytes, format_count, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("20GiB", 20 * 2**30), ("500 MB", 500_000_000), ("1.5KiB", 1536), ("12", 12), (12, 12), ("7 b", 7)],
)
def test_sizes_are_read(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "20 apples", "-3GB", "1..2GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes(text, where="data.cache_limit")


def test_numbers_for_people() -> None:
    assert [format_count(n) for n in (7, 1_500, 1_234_567, 8.03e9)] == ["7", "1.5k", "1.23M", "8.03B"]
    assert [format_bytes(n) for n in (10, 1536, 5 * 2**30)] == ["10 B", "1.5 KiB", "5.0 GiB"]
    assert [format_duration(s) for s in (0.42, 42, 75, 3725)] == ["0.42s", "42s", "1m15s", "1h02m"]
