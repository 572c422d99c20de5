"""The interactive page of a sweep: one HTML file, without any other file or network.

Parallel coordinates to brush, the metrics against the step, any two of parameters and metrics against each other, and the
ranking; a trial under the pointer stands out in all of them.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from raydist.core import storage
from raydist.core.units import format_duration
from raydist.evaluation.figures import FAINT, graded
from raydist.evaluation.sweep_axes import GoalAxis, columns_of, format_value, goal_axis, lanes, robust_scale
from raydist.evaluation.sweep_page_script import PAGE
from raydist.evaluation.sweep_records import Goal, TrialRecord, final_value, pareto_front, ranking

_MAX_CURVE_POINTS = 200


def write_page(records: Sequence[TrialRecord], goals: Sequence[Goal], path: str, title: str) -> None:
    """Writes the page.

    Args:
        records: all trials.
        goals: the first decides colours and places; all are axes of the parallel coordinates.
        path: local or remote file.
        title: above the page.
    """
    data = json.dumps(page_data(records, goals), allow_nan=False).replace("<", "\\u003c")
    states = [record.state for record in records]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    page = PAGE.replace("@TITLE@", html.escape(title)).replace("@SUMMARY@", html.escape(summary or "no trials"))
    storage.write_bytes(path, page.replace("@DATA@", data).encode())


def page_data(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> dict[str, Any]:
    """What the page's script draws.

    Returns:
        ``axes`` of the parallel coordinates (parameters, then goals; positions from 0 to 1), ``metrics`` with the range that
        their pictures show, and ``trials`` from best to worst, each with its heights on the axes (None where it has
        no value), texts, final values, thinned curves and colour.
    """
    ranked = ranking(records, goals[0].metric, goals[0].mode)
    columns = columns_of(records)
    goal_axes = {goal.metric: axis for goal in goals if (axis := goal_axis(records, goal)) is not None}
    placed = [lanes(column, [record.name for record in ranked]) for column in columns]
    front = {record.name for record in pareto_front(records, goals)} if len(goals) > 1 else set()
    metrics = _metrics(records, goals)
    num_finished = 0
    trials = []
    for record in ranked:
        finished = record.state == "finished" and final_value(record, goals[0].metric) is not None
        num_finished += finished
        heights = [positions[record.name] for positions in placed]
        ends = [_height(record, axis) for axis in goal_axes.values()]
        trials.append(
            {
                "name": record.name,
                "place": num_finished if finished else None,
                "state": record.state,
                "front": record.name in front,
                "steps": record.num_steps,
                "seconds": round(record.seconds, 1),
                "time": format_duration(record.seconds) if record.seconds else "",
                "texts": [format_value(column.level(record.name)) for column in columns],
                "numbers": [column.values.get(record.name) for column in columns],
                "at": [column.position(record.name) for column in columns],
                "heights": [*heights, *ends],
                "values": {metric["name"]: final_value(record, metric["name"]) for metric in metrics},
                "curves": {metric["name"]: _thinned(record, metric["name"]) for metric in metrics},
                "colour": graded(ends[0]) if finished and ends and ends[0] is not None else FAINT,
            }
        )
    axes = [{"label": column.label, "key": column.key, "goal": False, "ticks": column.ticks()} for column in columns]
    axes += [
        {"label": name.removeprefix("validation/"), "key": name, "goal": True, "ticks": axis.ticks()}
        for name, axis in goal_axes.items()
    ]
    return {"axes": axes, "metrics": metrics, "goals": [goal.metric for goal in goals], "trials": trials}


def _metrics(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """Goals first, then whatever else was measured; with the range of final values and that of the ends of all curves."""
    others = sorted({metric for record in records for metric in record.curve} - {goal.metric for goal in goals})
    metrics = []
    for goal in [*goals, *(Goal(metric) for metric in others)]:
        axis, wide = goal_axis(records, goal), robust_scale(records, goal)
        if axis is not None and wide is not None:
            final, ends = [axis.scale.low, axis.scale.high], [wide.low, wide.high]
            metrics.append({"name": goal.metric, "mode": goal.mode, "final": final, "ends": ends})
    return metrics


def _height(record: TrialRecord, axis: GoalAxis) -> float | None:
    value = final_value(record, axis.goal.metric)
    return None if value is None else axis.position(value)


def _thinned(record: TrialRecord, metric: str) -> list[tuple[int, float]]:
    """At most :data:`_MAX_CURVE_POINTS` finite points, the last one among them."""
    points = [(step, value) for step, value in record.curve.get(metric, ()) if math.isfinite(value)]
    stride = max(1, math.ceil(len(points) / _MAX_CURVE_POINTS))
    return points[::-1][::stride][::-1]
