"""What the trials of a sweep are drawn along: an axis a parameter that varies, and one a goal."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydist.core.units import format_count
from raydist.evaluation.sweep_records import Goal, TrialRecord, comparable, final_value

Value = str | int | float
Tick = tuple[float, str]

_LOGARITHMIC_FROM_RATIO = 3.0
_TICKS_BY_RATIO = ((50.0, (1.0, 2.0, 5.0)), (3000.0, (1.0, 3.0)))  # of a decade
_MAX_LEVEL_TICKS = 8
_MIN_TICK_DISTANCE = 0.05
_MAX_TICK_CHARS = 22
_LEGEND_COLUMNS, _LEGEND_LINES = 40, 3
_WORDS = {
    "validation/bound_nats_per_token": "likelihood bound, nats per token",
    "validation/loss/ntp": "next-token loss, nats per token",
    "accuracy": "accuracy, share of tokens",
    "tokens_per_forward": "tokens per forward",
    "forwards_per_token": "forwards per token",
}
ABSENT = "\u2013"
_ABSENT_TICK = "not set"
ABSENT_POSITION = -0.13  # below a numeric axis, which goes from 0 to 1
REACH = 3.0
_MAX_LANE, _MAX_LANES, _LANE_SHARE = 0.02, 0.1, 0.6  # of an axis, of an axis, of the gap to the next level


@dataclass(frozen=True)
class Scale:
    """A numeric axis from 0 (``low``) to 1 (``high``)."""

    low: float
    high: float
    logarithmic: bool = False

    def position(self, value: float) -> float:
        """Where a value stands; 0.5 if the axis has only one value."""
        if self.high == self.low:
            return 0.5
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[Tick]:
        """Round values inside the axis."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.high == self.low:
            return [(0.5, format_number(self.low))]
        ratio = self.high / self.low if self.logarithmic else 1.0
        subs = next((subs for limit, subs in _TICKS_BY_RATIO if ratio <= limit), (1.0,))
        locator = LogLocator(subs=subs) if self.logarithmic else MaxNLocator(nbins=5)
        inside = [float(value) for value in locator.tick_values(self.low, self.high) if self.low <= value <= self.high]
        return [(self.position(value), format_number(value)) for value in inside]


def scale_of(values: Sequence[float]) -> Scale:
    """The axis that just holds these values: linear or logarithmic, whichever spreads them more evenly.

    That is the one on which their median is nearer to the middle; values within a factor of 3 stay linear.
    """
    low, high, median = float(min(values)), float(max(values)), statistics.median(values)
    linear, logarithmic = Scale(low, high), Scale(low, high, logarithmic=True)
    if low <= 0 or high < _LOGARITHMIC_FROM_RATIO * low:
        return linear
    return min(logarithmic, linear, key=lambda scale: abs(scale.position(median) - 0.5))


@dataclass(frozen=True)
class Column:
    """One key that varies between trials.

    Attributes:
        key: the recipe key, with dots.
        label: its shortest ending that no other column has.
        values: by trial name; a trial in which the key is not set is missing.
        levels: the distinct values, sorted; choices that some trial lacks end in :data:`ABSENT`.
        scale: where numbers stand; None for choices.
        partial: some trial lacks the key.
    """

    key: str
    label: str
    values: dict[str, Value]
    levels: Sequence[Value]
    scale: Scale | None
    partial: bool

    def level(self, trial: str) -> Value:
        """The trial's value, or :data:`ABSENT`."""
        return self.values.get(trial, ABSENT)

    def position(self, trial: str) -> float:
        """Where the trial stands on the axis: 0 to 1, or :data:`ABSENT_POSITION`."""
        value = self.level(trial)
        if self.scale is None:
            return self.levels.index(value) / (len(self.levels) - 1)
        return ABSENT_POSITION if isinstance(value, str) else self.scale.position(value)

    def ticks(self) -> list[Tick]:
        """Positions and texts: every level where there are few, round numbers where there are many."""
        if self.scale is None:
            last = len(self.levels) - 1
            texts = [_ABSENT_TICK if level == ABSENT else format_value(level) for level in self.levels]
            return [(index / last, text) for index, text in enumerate(texts)]
        if len(self.levels) <= _MAX_LEVEL_TICKS:
            ticks = _spread([(self.scale.position(float(level)), format_value(level)) for level in self.levels])
        else:
            ticks = self.scale.ticks()
        return [(ABSENT_POSITION, _ABSENT_TICK), *ticks] if self.partial else ticks


def columns_of(records: Sequence[TrialRecord]) -> list[Column]:
    """The columns of a sweep in the order in which its trials name their keys.

    Mappings are taken apart by dots. A key that has one value in all trials is left out, and so is one that has one value
    wherever it is set and with it tells nothing that the other columns do not (``power: 2`` of the one schedule with a
    power).
    """
    flat = {record.name: flatten(record.parameters) for record in records}
    keys = list(dict.fromkeys(key for parameters in flat.values() for key in parameters))
    values = {key: {name: row[key] for name, row in flat.items() if key in row} for key in keys}
    varying = [key for key in keys if len({flat[name].get(key) for name in flat}) > 1]
    for key in [key for key in varying if len(set(values[key].values())) == 1]:
        others = [other for other in varying if other != key]
        if _num_distinct(flat, others) == _num_distinct(flat, varying):
            varying = others
    labels = short_labels(varying)
    return [_column(key, labels[key], values[key], partial=len(values[key]) < len(flat)) for key in varying]


def flatten(parameters: Mapping[str, Any]) -> dict[str, Value]:
    """Dotted keys and plain values; lists, booleans and null become text, as they are written in YAML."""
    flat: dict[str, Value] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            flat.update((f"{key}.{inner}", leaf) for inner, leaf in flatten(value).items())
        elif isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
            flat[key] = value
        else:
            flat[key] = json.dumps(value, default=str)
    return flat


def short_labels(keys: Sequence[str]) -> dict[str, str]:
    """``objective.path.schedule.name`` as ``schedule``: the shortest endings that are all different.

    ``name`` says which one a section is, so the section's own key stands for it where that is not taken.
    """
    stems = {key: key.removesuffix(".name") if key.removesuffix(".name") not in keys else key for key in keys}
    labels = {}
    for key, stem in stems.items():
        parts = stem.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [other for other_key, other in stems.items() if other_key != key]
        labels[key] = next(
            (ending for ending in endings if not any(f".{other}".endswith(f".{ending}") for other in others)), stem
        )
    return labels


def describe(columns: Sequence[Column], trial: str) -> str:
    """``schedule cosine, lr 0.01``: what is special about a trial; its name where nothing is."""
    words = [f"{column.label} {format_value(column.values[trial])}" for column in columns if trial in column.values]
    return ", ".join(words) or trial


def format_value(value: Value) -> str:
    """A value of a parameter as people write it."""
    return value if isinstance(value, str) else format_number(value)


def format_number(value: float) -> str:
    """Short and without loss where it can be: ``0.0003`` as ``3e-4``, ``65536`` as ``65.5k``."""
    if value != 0 and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return format_count(float(value)) if abs(value) >= 10_000 else f"{value:.4g}"


def _num_distinct(flat: Mapping[str, Mapping[str, Value]], keys: Sequence[str]) -> int:
    return len({tuple(row.get(key) for key in keys) for row in flat.values()})


def _column(key: str, label: str, values: dict[str, Value], *, partial: bool) -> Column:
    numbers = [value for value in values.values() if not isinstance(value, str)]
    if len(numbers) == len(values):
        return Column(key, label, values, sorted(set(numbers)), scale_of(numbers), partial)
    levels = sorted(set(values.values()), key=_sort_key)
    return Column(key, label, values, [*levels, ABSENT] if partial else levels, None, partial)


def _sort_key(value: Value) -> tuple[bool, float, str]:
    return (True, 0.0, value) if isinstance(value, str) else (False, float(value), "")


def _spread(ticks: Sequence[Tick]) -> list[Tick]:
    """Without those that would stand on the one before."""
    kept: list[Tick] = []
    for tick in ticks:
        if not kept or tick[0] - kept[-1][0] >= _MIN_TICK_DISTANCE:
            kept.append(tick)
    return kept


@dataclass(frozen=True)
class GoalAxis:
    """A goal's values from 0 (bad) to 1 (best)."""

    goal: Goal
    scale: Scale

    def clip(self, value: float) -> float:
        """The nearest value that the axis holds."""
        return min(max(value, self.scale.low), self.scale.high)

    def position(self, value: float) -> float:
        """Values worse than the axis stand at its bad end."""
        at = self.scale.position(self.clip(value))
        return 1.0 - at if self.goal.mode == "min" and self.scale.low != self.scale.high else at

    def ticks(self) -> list[Tick]:
        """Round values inside the axis."""
        ticks = self.scale.ticks()
        if self.goal.mode == "max" or self.scale.low == self.scale.high:
            return ticks
        return [(1.0 - position, text) for position, text in ticks]


def goal_axis(records: Sequence[TrialRecord], goal: Goal) -> GoalAxis | None:
    """The axis of a goal's final values; None where there are none.

    Values of trials that did not finish are of an earlier step; they count only if less than two trials finished.
    """
    finished = comparable(records, [goal])
    scale = robust_scale(finished if len(finished) > 1 else records, goal)
    return None if scale is None else GoalAxis(goal, scale)


def robust_scale(records: Sequence[TrialRecord], goal: Goal) -> Scale | None:
    """From the best final value to the worst, but no further than three times as far from the best as the median is.

    One diverged trial must not press all others together.
    """
    values = [final_value(record, goal.metric) for record in records]
    costs = sorted(goal.sign * value for value in values if value is not None)
    if not costs:
        return None
    best, median = costs[0], statistics.median(costs)
    worst = min(costs[-1], best + REACH * (median - best)) if median > best else costs[-1]
    low, high = sorted((goal.sign * best, goal.sign * worst))
    return Scale(low, high)


def lanes(column: Column, trials: Sequence[str]) -> dict[str, float]:
    """Positions on a column's axis, with trials of one level side by side in the given order, so that none hides another.

    Args:
        column: where they stand.
        trials: names, e.g. from best to worst.
    """
    groups: dict[float, list[str]] = {}
    for trial in trials:
        groups.setdefault(column.position(trial), []).append(trial)
    stops = sorted(groups)
    gap = min((right - left for left, right in itertools.pairwise(stops)), default=1.0)
    placed = {}
    for position, names in groups.items():
        width = min(_MAX_LANE, min(_MAX_LANES, _LANE_SHARE * gap) / len(names))
        for index, name in enumerate(names):
            placed[name] = position + width * ((len(names) - 1) / 2 - index)
    return placed


def goal_words(goal: Goal) -> str:
    """A metric in words, with its unit."""
    return _WORDS.get(goal.metric, goal.metric)


def goal_label(goal: Goal) -> str:
    """The same, and which way is better."""
    return f"{goal_words(goal)}  ({'smaller' if goal.mode == 'min' else 'larger'} is better)"


def clipped(text: str) -> str:
    """A tick's text, cut where it would run into the next axis."""
    return _literal(text if len(text) <= _MAX_TICK_CHARS else text[: _MAX_TICK_CHARS - 1] + "\u2026")


def wrapped(text: str) -> str:
    """A legend's text in at most three lines, broken at commas."""
    text = ", ".join(part.replace(" ", "\u00a0") for part in text.split(", "))
    return _literal("\n".join(textwrap.wrap(text, _LEGEND_COLUMNS, max_lines=_LEGEND_LINES, placeholder=" \u2026")))


def _literal(text: str) -> str:
    """Dollar signs as they are, and not as the ends of a formula."""
    return text.replace("$", r"\$")
