"""``metrics.jsonl``: one JSON object per logged step, the source of truth of every curve.

A line is ``{"step": 20, "time": 1767225600.0, "attempt": 1, "loss": 5.25, ...}``, flushed as it is written. A process
that is killed while it writes leaves a torn last line: the next attempt takes it away, readers pass over it. JSON has
no infinities, so non-finite values are the strings ``"nan"``, ``"inf"`` and ``"-inf"``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from raydist.core import storage

FILE_NAME = "metrics.jsonl"
_RESERVED = ("step", "time", "attempt")

Curve = list[tuple[int, float]]


class JsonlTracker:
    """Appends to one ``metrics.jsonl``.

    Args:
        path: a local file; it is made, with its folder, if it is not there.
        attempt: which start of the run this is; by default one more than the last in the file.
    """

    def __init__(self, path: str, *, attempt: int | None = None) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        _mend_last_line(path)
        self.path = path
        self.attempt = _last_attempt(path) + 1 if attempt is None else attempt
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held until close)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Appends one line.

        Raises:
            ValueError: a metric is called ``step``, ``time`` or ``attempt``.
        """
        reserved = [key for key in metrics if key in _RESERVED]
        if reserved:
            raise ValueError(f"metric names {reserved} are taken by the record itself")
        record: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3), "attempt": self.attempt}
        record.update((key, _encode(float(value))) for key, value in metrics.items())
        self._stream.write(json.dumps(record, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def _encode(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _mend_last_line(path: str) -> None:
    """Ends the file in a newline: a last line that is whole gets one, a torn one is cut off."""
    try:
        with open(path, "r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            start = _start_of_last_line(stream, size)
            stream.seek(start)
            tail = stream.read()
            if not tail:
                return
            if parse_line(tail) is None:
                stream.truncate(start)
            else:
                stream.write(b"\n")
    except FileNotFoundError:
        return


def _start_of_last_line(stream: Any, size: int) -> int:
    """The position after the last newline of a binary file."""
    block = 1 << 16
    end = size
    while end > 0:
        start = max(0, end - block)
        stream.seek(start)
        newline = stream.read(end - start).rfind(b"\n")
        if newline >= 0:
            return int(start + newline + 1)
        end = start
    return 0


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One record, or None where the line is torn or no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record, without its own three keys."""
    return {key: float(value) for key, value in record.items() if key not in _RESERVED}


def read_records(path: str) -> Iterator[dict[str, Any]]:
    """The records of a local or remote file in the order they were written; torn lines are passed over."""
    if not storage.exists(path):
        return
    with storage.open_read(path) as stream:
        for line in stream:
            record = parse_line(line)
            if record is not None:
                yield record


def _last_attempt(path: str) -> int:
    return max((int(record.get("attempt", 0)) for record in read_records(path)), default=0)


def read_history(path: str) -> list[dict[str, Any]]:
    """The records of the history that was not rolled back, by step.

    An attempt that went on from step s overrules everything that earlier attempts wrote for the steps from its first
    record on, also steps that it has not reached yet.

    Args:
        path: ``metrics.jsonl``, local or remote; a missing file has no records.
    """
    kept: list[dict[str, Any]] = []
    limit = math.inf
    for records_of_attempt in reversed(_split_attempts(list(read_records(path)))):
        kept.extend(record for record in records_of_attempt if record["step"] < limit)
        limit = min(limit, min(record["step"] for record in records_of_attempt))
    return sorted(kept, key=lambda record: record["step"])


def read_curve(path: str) -> dict[str, Curve]:
    """The curves of a run: for each key ``(step, value)`` sorted by step, each step once.

    Args:
        path: ``metrics.jsonl``, local or remote; a missing file has no curves. What was rolled back is left out
            (:func:`read_history`).
    """
    curves: dict[str, dict[int, float]] = {}
    for record in read_history(path):
        for key, value in metrics_of(record).items():
            curves.setdefault(key, {})[record["step"]] = value
    return {key: sorted(curve.items()) for key, curve in curves.items()}


def _split_attempts(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups of neighbouring records with the same attempt, in file order."""
    groups: list[list[dict[str, Any]]] = []
    for record in records:
        if not groups or groups[-1][-1].get("attempt") != record.get("attempt"):
            groups.append([])
        groups[-1].append(record)
    return groups
