"""Searchers, the median rule and the budget, on a real cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raydist.evaluation.sweep_records import TrialRecord, final_value
from raydist.evaluation.sweep_report import ranking_table
from raydist.runtime.sweep import run_sweep
from tests.runtime.sweeps import METRIC, RATE, Watcher, assert_nothing_left, lines, make_sweep

pytestmark = pytest.mark.ray

MASKED = "validation/loss/matp"


def test_the_median_rule_stops_what_is_worse_than_the_others(others: set[str], dataset: str, tmp_path: Path) -> None:
    """Two learn and three do not; whoever starts last is judged by two others at least, of which one learned."""
    rates = [1e-2, 8e-3, 1e-7, 2e-7, 3e-7]
    scheduler = {"name": "median", "grace_steps": 4}
    sweep = make_sweep(tmp_path, dataset, space={RATE: rates}, scheduler=scheduler)
    outcome = run_sweep(sweep, resume=False, view=Watcher())
    ended = {record.parameters[RATE]: record for record in outcome.records}
    assert [ended[rate].state for rate in rates[:2]] == ["finished", "finished"]
    assert ended[rates[-1]].state == "stopped"
    assert all(4 <= record.num_steps < 8 for record in ended.values() if record.state == "stopped")
    assert_nothing_left(others=others)


def test_tpe_searches_and_a_resume_asks_for_no_more(others: set[str], dataset: str, tmp_path: Path) -> None:
    """The space has all kinds of values; the dataset's own path must survive the trip through Optuna."""
    space = {
        RATE: {"log_uniform": [1e-4, 1e-2]},
        "objective.block_size_max": {"integer": [4, 16]},
        "training.learning_rate_schedule": [{"name": "cosine"}, {"name": "stable_decay"}],
        "training.learning_rate_schedule.decay_fraction": {
            "choice": [0.1, 0.3],
            "when": {"training.learning_rate_schedule.name": "stable_decay"},
        },
    }
    search = {"name": "tpe", "num_trials": 4}
    sweep = make_sweep(tmp_path, dataset, space=space, search=search)
    outcome = run_sweep(sweep, resume=False, view=Watcher())
    assert [record.state for record in outcome.records] == ["finished"] * 4
    for record in outcome.records:
        assert 1e-4 <= record.parameters[RATE] <= 1e-2
        assert record.parameters["objective.block_size_max"] in range(4, 17)
        is_stable = record.parameters["training.learning_rate_schedule"]["name"] == "stable_decay"
        assert ("training.learning_rate_schedule.decay_fraction" in record.parameters) == is_stable
    assert len({record.parameters[RATE] for record in outcome.records}) == 4
    watcher = Watcher()
    again = run_sweep(sweep, resume=True, view=watcher)
    assert watcher.ended == []
    assert [record.name for record in again.records] == [record.name for record in outcome.records]
    assert_nothing_left(others=others)


def test_tpe_with_two_metrics_ends_in_a_pareto_front(others: set[str], dataset: str, tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path,
        dataset,
        space={RATE: {"log_uniform": [1e-4, 1e-2]}, "training.optimizer.weight_decay": {"uniform": [0.0, 0.5]}},
        search={"name": "tpe", "num_trials": 4},
        metric=[{"name": METRIC}, {"name": MASKED}],
    )
    outcome = run_sweep(sweep, resume=False, view=Watcher())
    assert [record.state for record in outcome.records] == ["finished"] * 4
    assert "pareto_front.png" in {os.path.basename(path) for path in outcome.pictures}
    table = ranking_table(outcome.records, outcome.goals)
    shown = {row[1] for row in table.rows if str(row[0]).endswith("*")}
    assert shown == undominated(outcome.records)
    assert_nothing_left(others=others)


def undominated(records: list[TrialRecord]) -> set[str]:
    """By its definition: nobody is at least as good in both and better in one."""
    values = {record.name: (final_value(record, METRIC), final_value(record, MASKED)) for record in records}
    return {
        name
        for name, (first, second) in values.items()
        if not any(a <= first and b <= second and (a, b) != (first, second) for a, b in values.values())
    }


def test_a_budget_ends_a_sweep_that_can_go_on(others: set[str], dataset: str, tmp_path: Path) -> None:
    """The time is over before the first validation: running trials end there, and the third one is never begun."""
    rates = [1e-3, 3e-3, 1e-2]
    asha = {"name": "asha", "grace_steps": 7}  # stops nobody before the last step
    budget = {"num_steps": 8, "max_wall_s": 1.0}
    sweep = make_sweep(tmp_path, dataset, space={RATE: rates}, budget=budget, scheduler=asha)
    outcome = run_sweep(sweep, resume=False, view=Watcher())
    assert outcome.has_more
    assert outcome.best is None
    begun = [record.name for record in outcome.records]
    assert begun
    assert len(begun) < len(rates)
    assert {(record.state, record.num_steps) for record in outcome.records} == {("waiting", 2)}
    assert_nothing_left(others=others)
    longer = make_sweep(tmp_path, dataset, space={RATE: rates}, budget={"num_steps": 8}, scheduler=asha)
    watcher = Watcher()
    whole = run_sweep(longer, resume=True, view=watcher)
    assert not whole.has_more
    assert [(record.state, record.num_steps) for record in whole.records] == [("finished", 8)] * 3
    assert sorted(watcher.ended) == [f"rates-{index:03d}" for index in range(3)]
    last = {line["name"]: line["state"] for line in lines(Path(whole.folder.path))}
    assert set(last.values()) == {"finished"}
    assert_nothing_left(others=others)
