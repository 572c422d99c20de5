import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.objectives.window_permutation import leftmost_disjoint, permuted_order, windows_fit

FLAGS = st.lists(st.booleans(), min_size=1, max_size=40)


def scanned(candidates, width):
    """The scan, written plainly."""
    starts, index = [False] * len(candidates), 0
    while index < len(candidates):
        if candidates[index]:
            starts[index] = True
            index += width
        else:
            index += 1
    return starts


@settings(max_examples=200, deadline=None)
@given(FLAGS, st.integers(2, 6))
def test_leftmost_disjoint_equals_the_scan(flags, width):
    rows = torch.tensor([flags, flags[::-1]])
    expected = torch.tensor([scanned(flags, width), scanned(flags[::-1], width)])
    assert torch.equal(leftmost_disjoint(rows, width=width), expected)


@settings(max_examples=100, deadline=None)
@given(FLAGS, st.integers(2, 6))
def test_windows_fit_where_all_their_tokens_may_move(flags, width):
    expected = [start + width <= len(flags) and all(flags[start : start + width]) for start in range(len(flags))]
    assert windows_fit(torch.tensor([flags]), width=width)[0].tolist() == expected


@settings(max_examples=200, deadline=None)
@given(FLAGS, st.integers(2, 6), st.sampled_from(["rotate", "random"]), st.integers(0, 1000))
def test_02_order_is_a_permutation_inside_windows(flags, width, permutation, seed):
    starts = leftmost_disjoint(windows_fit(torch.tensor([flags]), width=width), width=width)
    uniforms = torch.rand(1, len(flags), generator=torch.Generator().manual_seed(seed))
    order = permuted_order(starts, uniforms, width=width, permutation=permutation)[0].tolist()
    assert sorted(order) == list(range(len(flags)))
    inside = set()
    for start in starts[0].nonzero()[:, 0].tolist():
        window = list(range(start, start + width))
        inside.update(window)
        assert sorted(order[start : start + width]) == window
        if permutation == "rotate":
            moved = order[start + width - 1]
            assert moved < start + width - 1
            assert order[start : start + width - 1] == [place for place in window if place != moved]
    assert all(order[place] == place for place in range(len(flags)) if place not in inside)


def orders_of(width, permutation, *, num=4000):
    starts = torch.zeros(num, width + 2, dtype=torch.bool)
    starts[:, 1] = True
    uniforms = torch.rand(num, width + 2, generator=torch.Generator().manual_seed(0))
    return Counter(
        map(tuple, permuted_order(starts, uniforms, width=width, permutation=permutation)[:, 1 : 1 + width].tolist())
    )


@pytest.mark.parametrize(
    ("permutation", "width", "num_orders"), [("swap", 2, 1), ("rotate", 2, 1), ("rotate", 4, 3), ("random", 3, 6)]
)
def test_orders_are_uniform(permutation, width, num_orders):
    counts = orders_of(width, permutation)
    assert len(counts) == num_orders
    expected = 4000 / num_orders
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert statistic <= (num_orders - 1) + 4 * math.sqrt(2 * (num_orders - 1))


def test_swap_and_rotate_are_the_same_for_two_tokens():
    assert orders_of(2, "swap") == orders_of(2, "rotate") == {(2, 1): 4000}
