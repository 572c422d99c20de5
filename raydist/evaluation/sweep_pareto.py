"""Trials against each other where a sweep has two goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from raydist.evaluation.figures import COLOURS, INK, MUTED, SPINE, new_figure, save_png, style_axes
from raydist.evaluation.sweep_axes import Column, columns_of, describe, goal_label, wrapped
from raydist.evaluation.sweep_records import Goal, TrialRecord, comparable, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_FRONT_LABELS = 14


def draw_pareto(records: Sequence[TrialRecord], goals: Sequence[Goal], path: str, title: str) -> None:
    """Writes a PNG of the finished trials by two goals, with the front: trials that no other one beats in both.

    Args:
        records: all trials.
        goals: the first is drawn upwards, the second to the right.
        path: local or remote file.
        title: over the picture.

    Raises:
        ValueError: there are not two goals.
    """
    if len(goals) != 2:
        raise ValueError(f"a front is drawn of two goals, not of {len(goals)}")
    figure = new_figure(title, width=11, height=5.6)
    axes = figure.subplots()
    front = pareto_front(records, goals)
    names = {record.name for record in front}
    beaten = [_place(record, goals) for record in comparable(records, goals) if record.name not in names]
    if beaten:
        axes.plot(*zip(*beaten, strict=True), "o", color=SPINE, markersize=6, alpha=0.8, markeredgewidth=0)
    _draw_front(axes, [_place(record, goals) for record in front], goals)
    style_axes(axes)
    axes.margins(0.08)
    axes.set_xlabel(goal_label(goals[1]), color=INK)
    axes.set_ylabel(goal_label(goals[0]), color=INK)
    _list_front(axes, front, columns=columns_of(records))
    counts = f"{len(front)} of {len(front) + len(beaten)} finished trials are on the front; grey: "
    figure.supxlabel(f"{counts}another is at least as good in both", x=0.012, ha="left", fontsize=8.5, color=MUTED)
    save_png(figure, path)


def _place(record: TrialRecord, goals: Sequence[Goal]) -> tuple[float, float]:
    """Right and up: the values of the second and of the first goal, where the trial has both."""
    up, right = (record.curve[goal.metric][-1][1] for goal in goals)
    return right, up


def _draw_front(axes: Axes, places: Sequence[tuple[float, float]], goals: Sequence[Goal]) -> None:
    """The front as steps, behind which every trial is beaten, with numbered points."""
    if not places:
        return
    where: Literal["post", "pre"] = "post" if goals[1].mode == "min" else "pre"
    ordered = sorted(places)
    axes.step(*zip(*ordered, strict=True), where=where, color=COLOURS[0], linewidth=1.2, alpha=0.5)
    axes.plot(*zip(*places, strict=True), "o", color=COLOURS[0], markersize=15, markeredgecolor="white")
    for number, (right, up) in enumerate(places, start=1):
        axes.text(
            right, up, str(number), color="white", fontsize=8, fontweight="bold", ha="center", va="center_baseline"
        )


def _list_front(axes: Axes, front: Sequence[TrialRecord], *, columns: Sequence[Column]) -> None:
    """What the numbers on the front are, beside the picture."""
    from matplotlib.lines import Line2D

    shown = front[:_MAX_FRONT_LABELS]
    texts = [wrapped(f"{number}  {describe(columns, record.name)}") for number, record in enumerate(shown, start=1)]
    if len(front) > len(shown):
        texts.append(f"... and {len(front) - len(shown)} more")
    axes.legend(
        [Line2D([], [], linestyle="none")] * len(texts),
        texts,
        frameon=False,
        fontsize=8.5,
        handlelength=0,
        handletextpad=0,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.02),
        labelcolor=INK,
    )
