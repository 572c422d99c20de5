"""Parallel coordinates of a sweep: each trial a line through its parameters to what it reached."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raydist.evaluation.figures import INK, MUTED, SPINE, graded, new_figure, save_png
from raydist.evaluation.sweep_axes import Tick, clipped, columns_of, goal_axis, lanes
from raydist.evaluation.sweep_records import Goal, TrialRecord, final_value, ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_parallel_coordinates(records: Sequence[TrialRecord], goals: Sequence[Goal], path: str, title: str) -> None:
    """Writes a PNG in which a trial is a line through its parameters to its final values.

    Goals are drawn with the best value on top and no further down than :func:`raydist.evaluation.sweep_axes.goal_axis`
    goes. Colour is the first goal, dark is good; trials that did not finish are thin, grey and dotted, for their values are of
    an earlier step.

    Args:
        records: all trials; those without a final value are left out.
        goals: metrics, each an axis at the right.
        path: local or remote file.
        title: over the picture.
    """
    columns = columns_of(records)
    drawn = [record for record in ranking(records, goals[0].metric, goals[0].mode) if _is_drawn(record, goals)]
    goal_axes = [axis for axis in (goal_axis(drawn, goal) for goal in goals) if axis is not None]
    names = [*(column.label for column in columns), *(axis.goal.metric for axis in goal_axes)]
    figure = new_figure(title, width=max(8.5, 2.0 + 1.9 * len(names)), height=5.6)
    axes = figure.subplots()
    placed = [lanes(column, [record.name for record in drawn]) for column in columns]
    for place, record in reversed(list(enumerate(drawn))):
        ends = [(axis, final_value(record, axis.goal.metric)) for axis in goal_axes]
        heights = [
            *(positions[record.name] for positions in placed),
            *(axis.position(value) for axis, value in ends if value is not None),
        ]
        _draw_line(axes, heights, style=_line_style(record, place=place, goodness=heights[len(columns)]))
    ticks = [*(column.ticks() for column in columns), *(axis.ticks() for axis in goal_axes)]
    for index, name in enumerate(names):
        _draw_axis(axes, index, name=name, ticks=ticks[index], is_goal=index >= len(columns))
    lowest = min([0.0, *(position for axis_ticks in ticks for position, _ in axis_ticks)])
    axes.set_ylim(lowest - 0.08, 1.1)
    axes.set_xlim(-0.55, len(names) - 0.3)
    axes.set_axis_off()
    figure.supxlabel(_line_key(records, drawn), x=0.012, ha="left", fontsize=8.5, color=MUTED)
    save_png(figure, path)


def _is_drawn(record: TrialRecord, goals: Sequence[Goal]) -> bool:
    return record.state in ("finished", "stopped", "running") and all(
        final_value(record, goal.metric) is not None for goal in goals
    )


def _line_style(record: TrialRecord, *, place: int, goodness: float) -> dict[str, Any]:
    if record.state != "finished":
        return {"edgecolor": SPINE, "linewidth": 1.0, "linestyle": (0, (1, 1.6)), "alpha": 0.9}
    return {
        "edgecolor": graded(goodness),
        "linewidth": 3.2 if place == 0 else 1.5,
        "alpha": 1.0 if place == 0 else 0.85,
    }


def _draw_line(axes: Axes, heights: Sequence[float], *, style: dict[str, Any]) -> None:
    """A smooth line that crosses each axis at a right angle, so that it can be followed through it."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    vertices = [(0.0, heights[0])]
    for index, (left, right) in enumerate(itertools.pairwise(heights)):
        vertices += [(index + 0.4, left), (index + 0.6, right), (index + 1.0, right)]
    codes = [Path.MOVETO, *[Path.CURVE4] * (len(vertices) - 1)]
    axes.add_patch(PathPatch(Path(vertices, codes), facecolor="none", capstyle="round", **style))


def _draw_axis(axes: Axes, index: int, *, name: str, ticks: Sequence[Tick], is_goal: bool) -> None:
    low = min([0.0, *(position for position, _ in ticks)])
    axes.plot([index, index], [low, 1.0], color=INK if is_goal else SPINE, linewidth=1.2, zorder=3)
    halo = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for position, text in ticks:
        axes.plot([index - 0.025, index], [position, position], color=SPINE, linewidth=1.0, zorder=3)
        axes.text(
            index - 0.04,
            position,
            clipped(text),
            fontsize=8.5,
            color=INK,
            ha="right",
            va="center",
            bbox=halo,
            zorder=4,
        )
    weight = "bold" if is_goal else "normal"
    axes.text(
        index, 1.08, name.replace("/", "/\n", 1), fontsize=9.5, color=INK, ha="center", va="bottom", weight=weight
    )


def _line_key(records: Sequence[TrialRecord], drawn: Sequence[TrialRecord]) -> str:
    words = ["best value on top, dark is good, thick is the best trial"]
    if any(record.state != "finished" for record in drawn):
        words.append("dotted: did not finish, value of an earlier step")
    num_silent = len(records) - len(drawn)
    if num_silent:
        words.append(f"{num_silent} without a value are not drawn")
    return "; ".join(words)
