"""All trials of a sweep against the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raydist.evaluation.figures import COLOURS, FAINT, INK, MUTED, SPINE, new_figure, save_png, style_axes
from raydist.evaluation.sweep_axes import columns_of, describe, format_number, goal_label, robust_scale, wrapped
from raydist.evaluation.sweep_records import Goal, TrialRecord, final_step, final_value, ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_IN_COLOUR = len(COLOURS)
_MARKERS = "osD^vP"
_START_SHARE = 0.1
_MARGIN = 0.06
_LOGARITHMIC_FROM_RATIO = 3.0


def draw_trial_curves(records: Sequence[TrialRecord], goals: Sequence[Goal], path: str, title: str) -> None:
    """Writes a PNG with a panel a goal: the metric against the step, for all trials.

    The best trials are in colour and named, the others grey. A ring ends a trial that was stopped, a cross one that failed
    or whose metric stopped being a number. The height holds :func:`raydist.evaluation.sweep_axes.robust_scale`
    of all trials and the curve of the best one without the first tenth of its steps, on a logarithm where they lie far
    apart.

    Args:
        records: all trials; those without a final value are named below the picture.
        goals: metrics to draw.
        path: local or remote file.
        title: over the picture.
    """
    figure = new_figure(title, width=11, height=1.0 + 4.2 * len(goals))
    panels = figure.subplots(len(goals), 1, squeeze=False)[:, 0]
    columns = columns_of(records)
    for axes, goal in zip(panels, goals, strict=True):
        ranked = [record for record in ranking(records, goal.metric, goal.mode) if _points(record, goal.metric)]
        for place, record in reversed(list(enumerate(ranked))):
            _draw_trial(axes, record, goal=goal, place=place, text=describe(columns, record.name))
        _fit_height(axes, ranked, goal)
        style_axes(axes)
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel(goal_label(goal).replace("  ", "\n"), color=INK)
        axes.set_xlabel("optimizer step", color=INK)
        _best_first_legend(axes)
    caption = _caption(records, goals)
    if caption:
        figure.supxlabel(caption, x=0.012, ha="left", fontsize=8.5, color=MUTED)
    save_png(figure, path)


def _points(record: TrialRecord, metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value in record.curve.get(metric, ()) if math.isfinite(value)]


def _draw_trial(axes: Axes, record: TrialRecord, *, goal: Goal, place: int, text: str) -> None:
    points = _points(record, goal.metric)
    in_colour = place < _MAX_IN_COLOUR
    style: dict[str, Any] = {"color": COLOURS[place] if in_colour else FAINT, "linewidth": 2.2 if place == 0 else 1.3}
    marker = _MARKERS[place] if in_colour else "o"
    (line,) = axes.plot(*zip(*points, strict=True), **style, marker=marker, markersize=4.0 if in_colour else 2.5)
    broken = record.state == "failed" or final_value(record, goal.metric) is None
    if broken or record.state == "stopped":
        end, colour = "x" if broken else "o", style["color"] if in_colour else SPINE
        axes.plot(*points[-1], end, markersize=6, markeredgewidth=1.4, color=colour, markerfacecolor="white")
    if in_colour:
        state = "" if record.state == "finished" else f" ({record.state})"
        label = f"{format_number(points[-1][1])}  {text}{state}"
        line.set_label(wrapped(label))


def _fit_height(axes: Axes, ranked: Sequence[TrialRecord], goal: Goal) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    scale = robust_scale(ranked, goal)
    if scale is None:
        return
    best = _points(ranked[0], goal.metric)
    start = _START_SHARE * best[-1][0]
    values = [scale.low, scale.high, *(value for step, value in best if step >= start)]
    low, high = min(values), max(values)
    if low > 0 and high > _LOGARITHMIC_FROM_RATIO * low:
        margin_ratio = (high / low) ** _MARGIN
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(lambda value, _: format_number(value))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low / margin_ratio, high * margin_ratio)
        return
    margin = _MARGIN * ((high - low) or abs(low) or 1.0)
    axes.set_ylim(low - margin, high + margin)


def _best_first_legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles[::-1],
            labels[::-1],
            frameon=False,
            fontsize=8.5,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.02),
            labelcolor=INK,
        )


def _caption(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> str:
    """What the picture leaves out."""
    words = []
    num_others = max(sum(bool(_points(record, goal.metric)) for record in records) for goal in goals) - _MAX_IN_COLOUR
    if num_others > 0:
        words.append(f"grey: the other {num_others} trials" if num_others > 1 else "grey: the other trial")
    silent = [record.name for record in records if all(final_step(record, goal.metric) < 0 for goal in goals)]
    if silent:
        words.append(f"without a final value: {', '.join(silent[:6])}{' ...' if len(silent) > 6 else ''}")
    if any(record.state in ("stopped", "failed") for record in records):
        words.append("ring: stopped; cross: failed")
    return "; ".join(words)
