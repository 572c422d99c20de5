"""Parallel coordinates of a sweep: each trial a line through its parameters to what it reached."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raydist.evaluation.figures import INK, MUTED, SPINE, graded, new_figure, save_png
from raydist.evaluation.sweep_axes import Tick, clipped, columns_of, goal_axis, goal_words, lanes
from raydist.evaluation.sweep_records import Goal, TrialRecord, at_common_step, final_value, ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_parallel_coordinates(records: Sequence[TrialRecord], goals: Sequence[Goal], path: str, title: str) -> None:
    """Writes a PNG in which a trial is a line through its parameters to its final values.

    Goals are drawn with the best value on top and no further down than :func:`raydist.evaluation.sweep_axes.goal_axis`
    goes. Colour is the first goal, dark is good; trials that did not finish are thin and dotted. Where trials were stopped
    early, an axis before those of the final values has the values of the last step that all trials reached; stopped ones
    end there. Where there is no such step they are grey, for their values are of an earlier one.

    Args:
        records: all trials; those without a final value are left out.
        goals: metrics, each an axis at the right.
        path: local or remote file.
        title: over the picture.
    """
    columns = columns_of(records)
    drawn = [record for record in ranking(records, goals[0].metric, goals[0].mode) if _is_drawn(record, goals)]
    ends = [(axis, "", drawn) for axis in (goal_axis(drawn, goal) for goal in goals) if axis is not None]
    then, step = at_common_step(drawn, goals)
    if step is not None:
        rung = [
            (axis, f" at step {step}", then) for axis in (goal_axis(then, goal) for goal in goals) if axis is not None
        ]
        ends = [*rung, *ends]
    names = [*(column.label for column in columns), *(goal_words(axis.goal) + when for axis, when, _ in ends)]
    figure = new_figure(title, width=max(8.5, 2.0 + 1.9 * len(names)), height=5.6)
    axes = figure.subplots()
    placed = [lanes(column, [record.name for record in drawn]) for column in columns]
    for place, record in reversed(list(enumerate(drawn))):
        is_cut = step is not None and record.state != "finished"
        values = [
            (axis, final_value(shown[place], axis.goal.metric)) for axis, when, shown in ends if when or not is_cut
        ]
        heights = [
            *(positions[record.name] for positions in placed),
            *(axis.position(value) for axis, value in values if value is not None),
        ]
        goodness = heights[len(columns)] if step is not None or record.state == "finished" else None
        _draw_line(axes, heights, style=_line_style(record, place=place, goodness=goodness))
    ticks = [*(column.ticks() for column in columns), *(axis.ticks() for axis, _, _ in ends)]
    for index, name in enumerate(names):
        _draw_axis(axes, index, name=name, ticks=ticks[index], is_goal=index >= len(columns))
    lowest = min([0.0, *(position for axis_ticks in ticks for position, _ in axis_ticks)])
    axes.set_ylim(lowest - 0.08, 1.1)
    axes.set_xlim(-0.55, len(names) - 0.3)
    axes.set_axis_off()
    figure.supxlabel(_line_key(records, drawn, step=step), x=0.012, ha="left", fontsize=8.5, color=MUTED)
    save_png(figure, path)


def _is_drawn(record: TrialRecord, goals: Sequence[Goal]) -> bool:
    return record.state in ("finished", "stopped", "running") and all(
        final_value(record, goal.metric) is not None for goal in goals
    )


def _line_style(record: TrialRecord, *, place: int, goodness: float | None) -> dict[str, Any]:
    colour = SPINE if goodness is None else graded(goodness)
    if record.state != "finished":
        return {"edgecolor": colour, "linewidth": 1.1, "linestyle": (0, (1, 1.6)), "alpha": 0.9}
    return {
        "edgecolor": colour,
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
    lines = name.replace(", ", ",\n", 1).replace("/", "/\n", 1).replace(" at step", "\nat step")
    axes.text(index, 1.08, lines, fontsize=9.5, color=INK, ha="center", va="bottom", weight=weight)


def _line_key(records: Sequence[TrialRecord], drawn: Sequence[TrialRecord], *, step: int | None) -> str:
    words = ["best value on top, dark is good, thick is the best trial"]
    if any(record.state != "finished" for record in drawn):
        words.append("dotted: did not finish" + (", value of an earlier step" if step is None else ""))
    num_silent = len(records) - len(drawn)
    if num_silent:
        words.append(f"{num_silent} without a value are not drawn")
    return "; ".join(words)
