"""Ranking and Pareto front against definitions written out the slow way."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydist.evaluation.sweep_records import (
    Goal,
    TrialRecord,
    at_common_step,
    comparable,
    final_value,
    pareto_front,
    ranking,
)


def trial(name, value=None, *, state="finished", steps=(10,), metric="loss"):
    curve = {} if value is None else {metric: [(step, value) for step in steps]}
    return TrialRecord(name, {}, state, curve)


def names(records):
    return [record.name for record in records]


def test_the_final_value_is_the_last_and_not_the_best():
    record = TrialRecord("a", {}, "finished", {"loss": [(10, 2.0), (20, 1.0), (30, 1.5)]})
    assert final_value(record, "loss") == 1.5
    assert final_value(record, "other") is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_trial_that_ends_in_no_number_has_no_value(broken):
    assert final_value(TrialRecord("a", {}, "finished", {"loss": [(10, 2.0), (20, broken)]}), "loss") is None


def test_finished_then_unfinished_by_how_far_then_failed_and_silent():
    records = [
        trial("silent", state="waiting"),
        trial("early", 0.1, state="stopped", steps=(10,)),
        trial("failed", 0.0, state="failed", steps=(40,)),
        trial("worse", 3.0, steps=(40,)),
        trial("late", 9.0, state="running", steps=(10, 20)),
        trial("best", 2.0, steps=(40,)),
        trial("late too", 8.0, state="stopped", steps=(10, 20)),
    ]
    assert names(ranking(records, "loss", "min")) == [
        "best", "worse", "late too", "late", "early", "failed", "silent",
    ]  # fmt: skip
    assert names(ranking(records, "loss", "max"))[:2] == ["worse", "best"]


@given(st.permutations([trial(name, value) for name, value in zip("abcde", (2.0, 1.0, 2.0, 1.0, 2.0), strict=True)]))
def test_the_ranking_does_not_depend_on_the_order_in_which_trials_ended(records):
    assert names(ranking(records, "loss", "min")) == ["b", "d", "a", "c", "e"]


values = st.integers(0, 4).map(float)


@given(
    points=st.lists(st.tuples(values, values, st.sampled_from(["finished", "stopped"])), max_size=12),
    modes=st.tuples(st.sampled_from(["min", "max"]), st.sampled_from(["min", "max"])),
)
def test_the_front_is_what_no_other_trial_dominates(points, modes):
    goals = [Goal("one", modes[0]), Goal("two", modes[1])]
    records = [
        TrialRecord(f"{index:02d}", {}, state, {"one": [(5, one)], "two": [(5, two)]})
        for index, (one, two, state) in enumerate(points)
    ]
    signs = [1 if mode == "min" else -1 for mode in modes]
    costs = {
        record.name: [sign * record.curve[metric][0][1] for sign, metric in zip(signs, ("one", "two"), strict=True)]
        for record in records
        if record.state == "finished"
    }
    beaten = {
        name
        for name, other in itertools.permutations(costs, 2)
        if costs[other][0] <= costs[name][0]
        and costs[other][1] <= costs[name][1]
        and (costs[other][0] < costs[name][0] or costs[other][1] < costs[name][1])
    }
    front = names(pareto_front(records, goals))
    assert set(front) == set(costs) - beaten
    assert front == sorted(front, key=lambda name: (costs[name], name))


def test_a_trial_that_lacks_one_goal_is_not_compared():
    goals = [Goal("one"), Goal("two")]
    records = [TrialRecord("a", {}, "finished", {"one": [(1, 0.0)]}), trial("b", 1.0, metric="one")]
    assert comparable(records, goals) == []
    assert pareto_front(records, goals) == []


def measured(name, *steps, state="stopped", broken=()):
    return TrialRecord(
        name, {}, state, {"loss": [(step, math.nan if step in broken else 100.0 - step) for step in steps]}
    )


def test_trials_that_were_stopped_early_are_compared_at_the_last_step_that_all_reached():
    records = [
        measured("whole", 10, 20, 30, 40, state="finished"),
        measured("first", 10, 20),
        measured("second", 10, 20, 30),
        measured("failed", 10, state="failed"),
        measured("waiting", state="waiting"),
    ]
    then, step = at_common_step(records, [Goal("loss")])
    assert step == 20
    assert [final_value(record, "loss") for record in then] == [80.0, 80.0, 80.0, 90.0, None]
    assert [record.state for record in then] == ["finished"] * 3 + ["failed", "waiting"]
    assert [record.num_steps for record in then[:3]] == [20, 20, 20]
    assert final_value(records[0], "loss") == 60.0, "the records themselves are as they were"


def test_there_is_nothing_to_align_where_no_trial_was_stopped_or_no_step_is_common():
    whole = [measured("a", 10, 20, state="finished"), measured("b", 10, state="running")]
    assert at_common_step(whole, [Goal("loss")]) == (whole, None)
    apart = [measured("a", 10), measured("b", 20)]
    assert at_common_step(apart, [Goal("loss")]) == (apart, None)
    assert at_common_step([], [Goal("loss")]) == ([], None)


def test_a_step_counts_as_reached_only_with_a_number():
    records = [measured("a", 10, 20, 30), measured("b", 10, 20, 30, broken=(20, 30))]
    assert at_common_step(records, [Goal("loss")])[1] == 10


@given(st.lists(st.sets(st.integers(1, 6), min_size=1), min_size=1, max_size=5))
def test_the_common_step_is_the_largest_one_in_all(steps):
    records = [measured(str(index), *sorted(some)) for index, some in enumerate(steps)]
    shared = [step for step in range(1, 7) if all(step in some for some in steps)]
    assert at_common_step(records, [Goal("loss")])[1] == (max(shared) if shared else None)
