"""The curves of a run for others to draw: each step of each metric once, with the attempt that computed it.

MLflow deletes no points, so what a restart rolled back stays in it. It is hidden here: by the run's own ``metrics.jsonl``
where that can be read, which is among the artifacts of every run that has ended, and by the tags of the attempts while
only MLflow knows the run.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydist.core import storage
from raydist.tracking import jsonl, server

if TYPE_CHECKING:
    from raydist.tracking.find import TrackedRun

_TAG = "raydist.attempt.{attempt}.{name}"
_FIRST_STEP_TAG = re.compile(r"raydist\.attempt\.(\d+)\.first_step")


@dataclass(frozen=True)
class Point:
    """One value of a curve.

    Attributes:
        metric: its key.
        step: optimizer steps done.
        value: may be a NaN or infinite.
        attempt: which start of the run computed it, from 1 on.
    """

    metric: str
    step: int
    value: float
    attempt: int


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as its tags tell it.

    Attributes:
        number: from 1 on.
        first_step: of its first record.
        start_time_ms: wall-clock time of that record.
    """

    number: int
    first_step: int
    start_time_ms: int


def attempt_tags(attempt: int, *, first_step: int, start_time_ms: int) -> dict[str, str]:
    """The tags that :func:`attempts_of` reads."""
    values = {"first_step": str(first_step), "start_time_ms": str(start_time_ms)}
    return {_TAG.format(attempt=attempt, name=name): value for name, value in values.items()}


def attempts_of(tags: Mapping[str, str]) -> list[Attempt]:
    """The attempts that a run's tags tell of, in order; tags that are no numbers are passed over."""
    found = []
    for key in tags:
        matched = _FIRST_STEP_TAG.fullmatch(key)
        if matched is None:
            continue
        number = int(matched[1])
        start_time_ms = tags.get(_TAG.format(attempt=number, name="start_time_ms"), "")
        if tags[key].isdecimal() and start_time_ms.isdecimal():
            found.append(Attempt(number, int(tags[key]), int(start_time_ms)))
    return sorted(found, key=lambda attempt: attempt.number)


def points_of_file(path: str) -> list[Point]:
    """The points of a ``metrics.jsonl``, local or remote, by metric and step."""
    return _sorted(
        Point(metric, record["step"], value, int(record.get("attempt", 1)))
        for record in jsonl.read_history(path)
        for metric, value in jsonl.metrics_of(record).items()
    )


def points_of_run(run: TrackedRun, *, metrics: Sequence[str] | None = None) -> list[Point]:
    """The points of a run that MLflow knows, by metric and step.

    Args:
        run: the run.
        metrics: which ones; None for all.

    Raises:
        TrackingError: MLflow cannot be reached, or the metrics file among the artifacts was changed.
    """
    from raydist.tracking.artifacts import list_artifacts
    from raydist.tracking.pull import pull

    if run.status != "RUNNING" and any(entry.name == jsonl.FILE_NAME for entry in list_artifacts(run)):
        with tempfile.TemporaryDirectory() as scratch:
            pull(run, to=scratch, names=[jsonl.FILE_NAME])
            points = points_of_file(os.path.join(scratch, jsonl.FILE_NAME))
        return [point for point in points if metrics is None or point.metric in metrics]
    return _points_of_history(run, metrics=sorted(run.metrics) if metrics is None else metrics)


def _points_of_history(run: TrackedRun, *, metrics: Sequence[str]) -> list[Point]:
    with server.explained(run.uri):
        client = server.connect(run.uri)
        history = [metric for key in metrics for metric in client.get_metric_history(run.run_id, key)]
    attempts = attempts_of(run.tags)
    reached = _reached_step(attempts, [(metric.step, metric.timestamp) for metric in history])
    latest = {(m.key, m.step): m for m in sorted(history, key=lambda m: m.timestamp) if m.step <= reached}
    return _sorted(
        Point(m.key, m.step, float(m.value), _attempt_at(m.timestamp, attempts=attempts)) for m in latest.values()
    )


def _reached_step(attempts: Sequence[Attempt], points: Sequence[tuple[int, int]]) -> float:
    """How far the last attempt is, as far as MLflow knows: steps that it repeats are not sent again."""
    if not attempts:
        return math.inf
    last = attempts[-1]
    own = [step for step, time_ms in points if time_ms >= last.start_time_ms]
    return max(own, default=last.first_step - 1)


def _attempt_at(time_ms: int, *, attempts: Sequence[Attempt]) -> int:
    return max((attempt.number for attempt in attempts if attempt.start_time_ms <= time_ms), default=1)


def _sorted(points: Iterable[Point]) -> list[Point]:
    return sorted(points, key=lambda point: (point.metric, point.step))


def write_csv(points: Sequence[Point], *, path: str) -> None:
    """Writes ``metric,step,value,attempt``, one point a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "step", "value", "attempt"])
    writer.writerows([point.metric, point.step, repr(point.value), point.attempt] for point in points)
    storage.write_bytes(path, text.getvalue().encode())
