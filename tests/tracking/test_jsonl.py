"""metrics.jsonl: what is written comes back, torn lines do not, and no step comes twice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydist.tracking.jsonl import JsonlTracker, read_curve, read_records


def write(path: Path, attempts: list[list[int]]) -> None:
    """One tracker an attempt; the value says attempt and step."""
    for number, steps in enumerate(attempts, start=1):
        tracker = JsonlTracker(str(path))
        assert tracker.attempt == number
        for step in steps:
            tracker.log_metrics({"loss": 1000 * number + step}, step=step)
        tracker.close()


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(str(path), attempt=3)
    tracker.log_metrics({"loss": 0.1, "loss/ntp": 2.0}, step=1)
    tracker.log_metrics({"loss": 1e-300}, step=7)
    assert read_curve(str(path)) == {"loss": [(1, 0.1), (7, 1e-300)], "loss/ntp": [(1, 2.0)]}  # before close
    tracker.close()
    assert [record["attempt"] for record in read_records(str(path))] == [3, 3]


def test_non_finite_values_are_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(str(path))
    tracker.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, step=1)
    tracker.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    curves = read_curve(str(path))
    assert math.isnan(curves["a"][0][1])
    assert curves["b"] == [(1, math.inf)]
    assert curves["c"] == [(1, -math.inf)]


def test_a_line_torn_at_any_byte_is_dropped_and_the_next_attempt_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [[1, 2]])
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for cut in range(first_line, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read_curve(str(path)) == {"loss": [(1, 1001.0)]}
        tracker = JsonlTracker(str(path))
        tracker.log_metrics({"loss": 5.0}, step=2)
        tracker.close()
        assert read_curve(str(path)) == {"loss": [(1, 1001.0), (2, 5.0)]}
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_whole_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [[1, 2]])
    path.write_bytes(path.read_bytes()[:-1])
    write_again = JsonlTracker(str(path))
    write_again.log_metrics({"loss": 9.0}, step=3)
    write_again.close()
    assert read_curve(str(path)) == {"loss": [(1, 1001.0), (2, 1002.0), (3, 9.0)]}


def test_a_torn_line_longer_than_the_read_block(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [[1]])
    with open(path, "ab") as stream:
        stream.write(b'{"step": 2, "x": "' + b"y" * 200_000)
    JsonlTracker(str(path)).close()
    assert path.read_bytes().count(b"\n") == 1
    assert path.read_bytes().endswith(b"}\n")


def test_bytes_that_are_no_text_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\x00\x00\xff\n[1]\n{"loss": 1}\n{"step": 4, "loss": 2.0}\n')
    assert read_curve(str(path)) == {"loss": [(4, 2.0)]}


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 8)), min_size=1, max_size=5))
def test_the_curve_is_the_history_that_was_not_rolled_back(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]]
) -> None:
    attempts = [list(range(start, start + length)) for start, length in spans]
    path = tmp_path_factory.mktemp("curve") / "metrics.jsonl"
    write(path, attempts)

    expected: dict[int, float] = {}
    for number, steps in enumerate(attempts, start=1):  # brute force: play the history forwards
        expected = {step: value for step, value in expected.items() if step < steps[0]}
        expected.update({step: float(1000 * number + step) for step in steps})
    assert read_curve(str(path)) == {"loss": sorted(expected.items())}


def test_a_metric_cannot_take_the_name_of_the_record(tmp_path: Path) -> None:
    tracker = JsonlTracker(str(tmp_path / "metrics.jsonl"))
    with pytest.raises(ValueError, match="attempt"):
        tracker.log_metrics({"attempt": 1.0}, step=1)
    tracker.close()


def test_no_file_has_no_curves(tmp_path: Path) -> None:
    assert read_curve(str(tmp_path / "absent.jsonl")) == {}
