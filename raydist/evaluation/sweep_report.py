"""A sweep's outcome: the ranking as a table, and all its pictures in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydist.core import storage
from raydist.core.units import format_duration
from raydist.evaluation.sweep_axes import columns_of, format_value
from raydist.evaluation.sweep_curves import draw_trial_curves
from raydist.evaluation.sweep_marginals import draw_marginals
from raydist.evaluation.sweep_page import write_page
from raydist.evaluation.sweep_parallel import draw_parallel_coordinates
from raydist.evaluation.sweep_pareto import draw_pareto
from raydist.evaluation.sweep_records import Goal, TrialRecord, comparable, final_value, pareto_front, ranking

PAGE_NAME = "sweep.html"


@dataclass(frozen=True)
class RankingTable:
    """What the terminal shows, while a sweep runs and at its end; made for :func:`raydist.cli.output.table`."""

    columns: list[str]
    rows: list[list[Any]]


def ranking_table(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> RankingTable:
    """The trials from best to worst by the first goal: place, name, parameters that vary, step, goals, state and time.

    Only finished trials have a place; with several goals those on the front carry ``*``.
    """
    columns = columns_of(records)
    placed = {record.name: place for place, record in enumerate(_finished(records, goals), start=1)}
    front = {record.name for record in pareto_front(records, goals)} if len(goals) > 1 else set()
    rows = []
    for record in ranking(records, goals[0].metric, goals[0].mode):
        place = f"{placed.get(record.name, '')}{'*' if record.name in front else ''}"
        parameters = [format_value(column.level(record.name)) for column in columns]
        values = [final_value(record, goal.metric) for goal in goals]
        time = format_duration(record.seconds) if record.seconds else ""
        rows.append([place, record.name, *parameters, record.num_steps, *values, record.state, time])
    metrics = [goal.metric.removeprefix("validation/") for goal in goals]
    return RankingTable(["#", "trial", *(column.label for column in columns), "step", *metrics, "state", "time"], rows)


def write_report(records: Sequence[TrialRecord], goals: Sequence[Goal], *, folder: str, title: str) -> list[str]:
    """Writes the pictures that the trials have data for, and the interactive page.

    Args:
        records: all trials of the sweep, also failed and waiting ones.
        goals: the sweep's metrics, the one it is ranked by first.
        folder: local or remote; files of these names are replaced.
        title: over every picture, e.g. the sweep's name.

    Returns:
        The files written: ``metric_against_step.png`` (where a trial was measured more than once),
        ``parallel_coordinates.png`` and ``marginals.png`` (where a parameter varies and a trial that did not fail has
        values), ``pareto_front.png`` (two goals, a finished trial) and ``sweep.html`` (always).

    Raises:
        ValueError: there is no goal.
    """
    if not goals:
        raise ValueError("a report needs at least one goal")
    has_lines = _has_lines(records, goals)
    pictures = {
        "metric_against_step.png": draw_trial_curves if _has_curves(records, goals) else None,
        "parallel_coordinates.png": draw_parallel_coordinates if has_lines else None,
        "marginals.png": draw_marginals if has_lines else None,
        "pareto_front.png": draw_pareto if len(goals) == 2 and comparable(records, goals) else None,
    }
    written = []
    for name, draw in pictures.items():
        if draw is not None:
            written.append(storage.join(folder, name))
            draw(records, goals, written[-1], title)
    written.append(storage.join(folder, PAGE_NAME))
    write_page(records, goals, written[-1], title)
    return written


def _finished(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> list[TrialRecord]:
    return ranking(comparable(records, goals[:1]), goals[0].metric, goals[0].mode)


def _has_lines(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> bool:
    measured = [record for record in records if all(final_value(record, goal.metric) is not None for goal in goals)]
    return bool(columns_of(records)) and any(record.state != "failed" for record in measured)


def _has_curves(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> bool:
    return any(len(record.curve.get(goal.metric, ())) > 1 for record in records for goal in goals)
