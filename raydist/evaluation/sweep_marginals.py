"""Each parameter of a sweep by itself: what it does to the goals."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from raydist.evaluation.figures import COLOURS, INK, MUTED, SPINE, new_figure, save_png, style_axes
from raydist.evaluation.sweep_axes import (
    Column,
    GoalAxis,
    Tick,
    clipped,
    columns_of,
    format_number,
    goal_axis,
    goal_label,
)
from raydist.evaluation.sweep_records import Goal, TrialRecord, at_common_step, comparable, final_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS_PER_ROW = 4
_MAX_PANELS = 12
_MAX_LEVEL_GROUPS = 8
_NUM_QUANTILE_GROUPS = 4
_MAX_TICK_CHARS_IN_A_ROW = 26
_TICK_DISTANCE_PER_CHAR = 0.035  # of the axis
_MARGIN = 0.12
_KEY = "bar: median; line: trials that differ in this parameter alone"


def draw_marginals(records: Sequence[TrialRecord], goals: Sequence[Goal], path: str, title: str) -> None:
    """Writes a PNG with a panel a parameter and goal: the value against the parameter, the strongest first.

    Values are the final ones, or, where trials were stopped early, those of the last step at which all were measured. A
    bar is the median of the trials of a value; a title names the best and the worst of them. A thin line joins
    trials that differ in this parameter alone: they share data and noise, so along it nothing else changes.
    Rings did not finish or were stopped later. Values beyond the axis (:func:`raydist.evaluation.sweep_axes.goal_axis`)
    stand at its end.

    Args:
        records: all trials; those without a final value are left out.
        goals: metrics, each a row of panels.
        path: local or remote file.
        title: over the picture.
    """
    columns = columns_of(records)
    unfinished = {record.name for record in records if record.state != "finished"}
    records, step = at_common_step(records, goals)
    order = sorted(columns, key=lambda column: -effect(records, column, goals[0]))[:_MAX_PANELS]
    panels = [(goal, column) for goal in goals for column in order]
    num_per_row = max(1, min(_PANELS_PER_ROW, len(order)))
    num_rows = max(1, len(goals) * math.ceil(len(order) / num_per_row))
    figure = new_figure(title, width=max(7.0, 1.0 + 3.2 * num_per_row), height=1.1 + 3.0 * num_rows)
    grid = figure.subplots(num_rows, num_per_row, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    rows_per_goal = num_rows // len(goals)
    for index, (goal, column) in enumerate(panels):
        row, place = divmod(index % len(order), num_per_row)
        axes = grid[row + rows_per_goal * goals.index(goal)][place]
        axes.set_axis_on()
        _draw_marginal(axes, records, column=column, others=columns, goal=goal, rings=unfinished)
        if place == 0:
            axes.set_ylabel(goal_label(goal).replace("  ", "\n"), fontsize=9, color=INK)
    figure.supxlabel(
        _key(step, has_rings=bool(unfinished)) if order else "no parameter varies",
        x=0.012,
        ha="left",
        fontsize=8.5,
        color=MUTED,
    )
    save_png(figure, path)


def _key(step: int | None, *, has_rings: bool) -> str:
    """What the signs mean."""
    if step is not None:
        return f"all trials at step {step}, the last that all reached; ring: stopped then or later; {_KEY}"
    return f"{_KEY}; ring: did not finish, value of an earlier step" if has_rings else _KEY


def effect(records: Sequence[TrialRecord], column: Column, goal: Goal) -> float:
    """How far a parameter moves a goal: the distance of the largest and the smallest median of its groups.

    A group is the finished trials of one value, or a quarter of them where a number has more than eight values. 0 where there
    are less than two groups.
    """
    medians = _medians(records, column, goal)
    return max(medians) - min(medians) if len(medians) > 1 else 0.0


def _medians(records: Sequence[TrialRecord], column: Column, goal: Goal) -> list[float]:
    """Of each group, the best first."""
    medians = [statistics.median(values) for _, values in _groups(records, column, goal)]
    return sorted(medians, reverse=goal.mode == "max")


def _groups(records: Sequence[TrialRecord], column: Column, goal: Goal) -> list[tuple[list[float], list[float]]]:
    """Positions and final values of the finished trials of each group, in the order of the axis."""
    points = sorted(
        (column.position(record.name), value)
        for record in comparable(records, [goal])
        if (value := final_value(record, goal.metric)) is not None
    )
    if len(column.levels) > _MAX_LEVEL_GROUPS and column.scale is not None:
        size = max(1, math.ceil(len(points) / _NUM_QUANTILE_GROUPS))
        chunks = [points[start : start + size] for start in range(0, len(points), size)]
    else:
        stops = sorted({position for position, _ in points})
        chunks = [[point for point in points if point[0] == stop] for stop in stops]
    return [([position for position, _ in chunk], [value for _, value in chunk]) for chunk in chunks]


def _draw_marginal(
    axes: Axes,
    records: Sequence[TrialRecord],
    *,
    column: Column,
    others: Sequence[Column],
    goal: Goal,
    rings: Collection[str],
) -> None:
    finished, axis = comparable(records, [goal]), goal_axis(records, goal)
    if axis is None:
        return
    for names in _differ_here_alone(finished, column, others):
        line = sorted((column.position(name), value) for name, value in _values(finished, axis) if name in names)
        axes.plot(*zip(*line, strict=True), color=SPINE, linewidth=0.9, alpha=0.7, zorder=1)
    shown = [record for record in records if record.state in ("finished", "stopped", "running")]
    _draw_dots(
        axes, [record for record in shown if record.name not in rings], column=column, axis=axis, face=COLOURS[0]
    )
    _draw_dots(axes, [record for record in shown if record.name in rings], column=column, axis=axis, face="white")
    for positions, values in _groups(records, column, goal):
        if len(values) > 1:
            middle, median = statistics.fmean(positions), axis.clip(statistics.median(values))
            half = max(0.05, (positions[-1] - positions[0]) / 2)
            axes.plot([middle - half, middle + half], [median] * 2, color=COLOURS[1], linewidth=2.4, zorder=4)
    _fit_height(axes, axis)
    style_axes(axes)
    _label_levels(axes, column.ticks())
    medians = _medians(records, column, goal)
    words = f":  medians {format_number(medians[0])} to {format_number(medians[-1])}" if len(medians) > 1 else ""
    axes.set_title(f"{column.label}{words}", loc="left", fontsize=9.5, color=INK)


def _fit_height(axes: Axes, axis: GoalAxis) -> None:
    margin = 0.08 * ((axis.scale.high - axis.scale.low) or abs(axis.scale.high) or 1.0)
    axes.set_ylim(axis.scale.low - margin, axis.scale.high + margin)


def _draw_dots(axes: Axes, records: Sequence[TrialRecord], *, column: Column, axis: GoalAxis, face: str) -> None:
    points = [(column.position(name), value) for name, value in _values(records, axis)]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            "o",
            markersize=5.5,
            markerfacecolor=face,
            markeredgecolor=COLOURS[0] if face == "white" else "white",
            markeredgewidth=1.0 if face == "white" else 0.5,
            zorder=3,
        )


def _values(records: Sequence[TrialRecord], axis: GoalAxis) -> list[tuple[str, float]]:
    """Names and final values, the ones beyond the axis at its end."""
    pairs = [(record.name, final_value(record, axis.goal.metric)) for record in records]
    return [(name, axis.clip(value)) for name, value in pairs if value is not None]


def _differ_here_alone(records: Sequence[TrialRecord], column: Column, columns: Sequence[Column]) -> list[set[str]]:
    """Sets of two and more trials that agree in every other column."""
    groups: dict[tuple[Any, ...], set[str]] = {}
    for record in records:
        rest = tuple(other.level(record.name) for other in columns if other.key != column.key)
        groups.setdefault(rest, set()).add(record.name)
    return [names for names in groups.values() if len(names) > 1]


def _label_levels(axes: Axes, ticks: Sequence[Tick]) -> None:
    axes.set_xlim(min([0.0, *(position for position, _ in ticks)]) - _MARGIN, 1.0 + _MARGIN)
    tight = any(
        right[0] - left[0] < _TICK_DISTANCE_PER_CHAR * (len(left[1]) + len(right[1])) / 2
        for left, right in itertools.pairwise(ticks)
    )
    turned = tight or sum(len(text) for _, text in ticks) > _MAX_TICK_CHARS_IN_A_ROW
    axes.set_xticks(
        [position for position, _ in ticks],
        [clipped(text) for _, text in ticks],
        rotation=25 if turned else 0,
        ha="right" if turned else "center",
        rotation_mode="anchor" if turned else "default",
        fontsize=8.5,
    )
