"""Columns of a sweep: which keys vary, what they are called, and where their values stand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydist.evaluation.sweep_axes import (
    ABSENT,
    ABSENT_POSITION,
    REACH,
    columns_of,
    describe,
    flatten,
    format_number,
    goal_axis,
    lanes,
    scale_of,
    short_labels,
    wrapped,
)
from raydist.evaluation.sweep_records import Goal, TrialRecord


def trials(*parameters):
    return [TrialRecord(f"t{index}", dict(row), "finished") for index, row in enumerate(parameters)]


def by_label(records):
    return {column.label: column for column in columns_of(records)}


def test_mappings_are_taken_apart_and_constants_left_out():
    records = trials(
        {"objective.path": {"name": "mixture", "schedule": {"name": "linear"}}, "training.seed": 1},
        {"objective.path": {"name": "mixture", "schedule": {"name": "cosine"}}, "training.seed": 1},
    )
    (column,) = columns_of(records)
    assert column.key == "objective.path.schedule.name"
    assert column.label == "schedule"
    assert column.levels == ["cosine", "linear"]
    assert describe([column], "t0") == "schedule linear"


def test_a_key_that_only_says_again_what_its_choice_says_is_left_out():
    linear, power_2 = {"s": {"name": "linear"}}, {"s": {"name": "polynomial", "power": 2}}
    assert list(by_label(trials(linear, power_2))) == ["s"]


def test_a_key_with_one_value_stays_where_it_is_the_only_difference():
    assert list(by_label(trials({"a": 1, "b": 5}, {"a": 1}, {"a": 2}))) == ["a", "b"]


def test_a_number_that_some_trials_lack_stands_below_its_axis():
    records = trials({"s": {"name": "linear"}}, *({"s": {"name": "power", "power": power}} for power in (1, 2, 3)))
    column = by_label(records)["power"]
    assert [column.position(record.name) for record in records] == [ABSENT_POSITION, 0.0, 0.5, 1.0]
    assert column.ticks() == [(ABSENT_POSITION, "not set"), (0.0, "1"), (0.5, "2"), (1.0, "3")]
    assert column.level("t0") == ABSENT


def test_choices_that_some_trials_lack_have_a_last_level():
    column = by_label(trials({"a": 1, "c": "x"}, {"a": 2, "c": "y"}, {"a": 3}))["c"]
    assert column.ticks() == [(0.0, "x"), (0.5, "y"), (1.0, "not set")]
    assert column.position("t2") == 1.0


def test_booleans_and_lists_are_choices():
    assert flatten({"a": True, "b": [1, 2], "c": None, "d": {"e": 0.5}}) == {
        "a": "true", "b": "[1, 2]", "c": "null", "d.e": 0.5,
    }  # fmt: skip
    assert by_label(trials({"a": True}, {"a": False}))["a"].scale is None


def test_numbers_and_words_mixed_are_choices_numbers_first():
    assert by_label(trials({"a": "auto"}, {"a": 8}, {"a": 2}))["a"].levels == [2, 8, "auto"]


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "name"]), min_size=1, max_size=4).map(".".join), unique=True, max_size=6
    )
)
def test_labels_are_different_endings_of_their_keys(keys):
    labels = short_labels(keys)
    assert len(set(labels.values())) == len(keys)
    for key, label in labels.items():
        assert f".{key}".endswith((f".{label}", f".{label}.name"))


def test_an_axis_is_logarithmic_where_that_spreads_its_values_more_evenly():
    assert scale_of([1e-4, 1e-3, 1e-2]).logarithmic
    assert scale_of([8, 16, 32, 64]).logarithmic
    assert not scale_of([0.01, 0.05, 0.1, 0.15, 0.2]).logarithmic
    assert not scale_of([0.0, 1e-3, 1.0]).logarithmic
    assert not scale_of([2, 3, 4]).logarithmic


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_positions_keep_the_order_and_fill_the_axis(values):
    scale = scale_of(values)
    positions = [scale.position(value) for value in sorted(values)]
    assert positions == sorted(positions)
    if max(values) > min(values):
        assert positions[0] == 0.0
        assert positions[-1] == pytest.approx(1.0)
    else:
        assert set(positions) == {0.5}
    for position, text in scale.ticks():
        assert -1e-9 <= position <= 1 + 1e-9
        assert text


def goal_records(values, state="finished"):
    return [TrialRecord(f"{state}{index}", {}, state, {"m": [(1, value)]}) for index, value in enumerate(values)]


@pytest.mark.parametrize(("mode", "sign"), [("min", 1.0), ("max", -1.0)])
def test_the_best_value_is_on_top_and_a_diverged_one_does_not_stretch_the_axis(mode, sign):
    axis = goal_axis(goal_records([sign * value for value in (2.0, 2.5, 3.0, 1e6)]), Goal("m", mode))
    assert axis.position(sign * 2.0) == pytest.approx(1.0)
    worst = 2.0 + REACH * (2.75 - 2.0)
    assert axis.position(sign * worst) == pytest.approx(0.0)
    assert axis.position(sign * 1e6) == pytest.approx(0.0)
    assert 0 < axis.position(sign * 3.0) < axis.position(sign * 2.5) < 1


def test_unfinished_trials_shape_the_axis_only_where_nothing_else_does():
    stopped = goal_records([9.0, 8.0], "stopped")
    assert goal_axis([*goal_records([1.0, 2.0]), *stopped], Goal("m")).scale.high == 2.0
    assert goal_axis([*goal_records([1.0]), *stopped], Goal("m")).scale.high == 9.0
    assert goal_axis(goal_records([math.nan]), Goal("m")) is None


@given(st.lists(st.sampled_from(["x", "y", "z"]), min_size=2, max_size=30))
def test_lanes_of_different_levels_never_cross_and_those_of_one_are_in_order(levels):
    records = trials(*({"c": level, "n": index} for index, level in enumerate(levels)))
    column = by_label(records).get("c")
    if column is None:
        return
    order = [record.name for record in records]
    placed = lanes(column, order)
    for one, other in itertools.combinations(order, 2):
        if column.position(one) == column.position(other):
            assert placed[one] > placed[other]
        else:
            assert (placed[one] > placed[other]) == (column.position(one) > column.position(other))


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-4, "3e-4"), (0.01, "0.01"), (0, "0"), (-2.5e-5, "-2.5e-5"), (8, "8"), (65536, "65.5k"), (2.34567, "2.346")],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_legend_texts_break_at_commas():
    text = "2.555  schedule kinetic_optimal, learning_rate 0.001, batch_rows 64"
    assert wrapped(text).replace("\u00a0", " ").split("\n") == [
        "2.555  schedule kinetic_optimal,",
        "learning_rate 0.001, batch_rows 64",
    ]
