"""What a sweep's trials were and did, how they rank, and which of them no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

TrialState = Literal["finished", "stopped", "failed", "running", "waiting"]
Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Goal:
    """One metric that a sweep wants small (``min``) or large (``max``)."""

    metric: str
    mode: Mode = "min"

    @property
    def sign(self) -> float:
        """Turns a value into a cost: 1 for ``min``, -1 for ``max``."""
        return 1.0 if self.mode == "min" else -1.0


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a sweep.

    Attributes:
        name: unique in the sweep.
        parameters: recipe key to value, of the keys that the sweep varies. A value may be a mapping (a whole
            ``objective.path``); a key that a condition leaves out is missing.
        state: ``finished`` ran to its last step, ``stopped`` was ended early by the scheduler or the budget.
        curve: for each metric ``(step, value)``, sorted by step.
        run_dir: the trial's run directory; None before it has one.
        num_steps: optimizer steps done.
        seconds: wall-clock time over all attempts.
    """

    name: str
    parameters: dict[str, Any]
    state: TrialState
    curve: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    run_dir: str | None = None
    num_steps: int = 0
    seconds: float = 0.0


def final_value(record: TrialRecord, metric: str) -> float | None:
    """The last value of a metric; None where there is none or where it is not a number.

    The last and not the best: the best of many noisy values is smaller than any of them would be again, and the more so
    the more often a trial was measured.
    """
    curve = record.curve.get(metric)
    return curve[-1][1] if curve and math.isfinite(curve[-1][1]) else None


def final_step(record: TrialRecord, metric: str) -> int:
    """The step of :func:`final_value`; -1 without one."""
    return -1 if final_value(record, metric) is None else record.curve[metric][-1][0]


def ranking(records: Sequence[TrialRecord], metric: str, mode: Mode = "min") -> list[TrialRecord]:
    """The trials from best to worst.

    Values at different steps cannot be compared. Finished trials come first, by value. Behind them come those that did
    not finish, the further one first: at the steps where it was compared with the others, it was kept. Last are
    failed trials and those without a finite value. Equal trials keep the order of their names, so that the
    ranking does not depend on the order in which they ended.
    """
    goal = Goal(metric, mode)

    def key(record: TrialRecord) -> tuple[int, int, float, str]:
        value = final_value(record, metric)
        if value is None or record.state == "failed":
            return (2, 0, 0.0 if value is None else goal.sign * value, record.name)
        if record.state == "finished":
            return (0, 0, goal.sign * value, record.name)
        return (1, -final_step(record, metric), goal.sign * value, record.name)

    return sorted(records, key=key)


def at_common_step(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> tuple[list[TrialRecord], int | None]:
    """The trials as they were at the last step at which all of them were measured, so that early stopped ones count as well.

    Returns:
        The trials, as finished at that step, and the step; the trials unchanged and None where none was stopped or there is
        no such step. Trials that failed, or have no value yet, do not hold the others back and stay as they are.
    """
    steps = {
        record.name: set.intersection(*(_measured_steps(record, goal.metric) for goal in goals))
        for record in records
        if record.state != "failed"
    }
    measured = {name: found for name, found in steps.items() if found}
    common = set.intersection(*measured.values()) if measured else set()
    if not common or not any(record.state == "stopped" for record in records):
        return list(records), None
    last = max(common)
    return [_as_of(record, last) if record.name in measured else record for record in records], last


def _measured_steps(record: TrialRecord, metric: str) -> set[int]:
    return {step for step, value in record.curve.get(metric, ()) if math.isfinite(value)}


def _as_of(record: TrialRecord, last: int) -> TrialRecord:
    curve = {metric: [point for point in points if point[0] <= last] for metric, points in record.curve.items()}
    return replace(record, state="finished", curve=curve, num_steps=last)


def comparable(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> list[TrialRecord]:
    """The finished trials that have a finite value of every goal."""
    return [
        record
        for record in records
        if record.state == "finished" and all(final_value(record, goal.metric) is not None for goal in goals)
    ]


def pareto_front(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> list[TrialRecord]:
    """The finished trials that no other finished trial dominates, from the best to the worst of the first goal.

    A trial dominates another if it is at least as good in every goal and better in one. Trials with the same values do
    not dominate each other: all of them are on the front.
    """
    costs = {record.name: _costs(record, goals) for record in comparable(records, goals)}
    front = [
        record
        for record in records
        if record.name in costs and not any(_dominates(other, costs[record.name]) for other in costs.values())
    ]
    return sorted(front, key=lambda record: (costs[record.name], record.name))


def _costs(record: TrialRecord, goals: Sequence[Goal]) -> tuple[float, ...]:
    values = [(goal, final_value(record, goal.metric)) for goal in goals]
    return tuple(goal.sign * value for goal, value in values if value is not None)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
