"""Alignments of pairs of sequences. Numbers in test names are those of the invariants of arXiv 2506.09018 in our sheet."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.objectives.alignment import BLANK, Ragged, align
from raydist.objectives.levenshtein import NOTHING, optimal_columns
from tests.sampling.oracle import chi_square

KINDS = ["optimal", "random", "padded", "shuffled", "replace"]
sequences = st.lists(st.integers(0, 3), max_size=9)


def ragged(lists):
    lengths = torch.tensor([len(one) for one in lists])
    tokens = torch.full((len(lists), int(lengths.max())), BLANK)
    for row, one in enumerate(lists):
        tokens[row, : len(one)] = torch.tensor(one, dtype=torch.int64)
    return Ragged(tokens, lengths)


def aligned_lists(starts, datas, *, kind, seed=0):
    start, data = ragged(starts), ragged(datas)
    width = start.tokens_SL.shape[1] + data.tokens_SL.shape[1]
    uniforms = torch.rand(len(starts), width, generator=torch.Generator().manual_seed(seed))
    aligned = align(start, data, kind=kind, uniforms_SN=uniforms)
    return aligned.start_SN.tolist(), aligned.data_SN.tolist()


def distance(a, b):
    """Levenshtein, written plainly."""
    row = list(range(len(b) + 1))
    for i, symbol in enumerate(a, 1):
        previous, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (symbol != other)))
    return row[-1]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(sequences, sequences), min_size=1, max_size=5))
def test_01_optimal_alignments_have_the_levenshtein_number_of_edits(pairs):
    starts, datas = zip(*pairs, strict=True)
    for z0, z1, x0, x1 in zip(*aligned_lists(starts, datas, kind="optimal"), starts, datas, strict=True):
        assert sum(a != b for a, b in zip(z0, z1, strict=True)) == distance(x0, x1)


def test_01_long_sequences_too():
    """Many diagonals, so that the table is worked in several windows."""
    rng = np.random.default_rng(2)
    starts, datas = ([rng.integers(0, 3, rng.integers(40, 90)).tolist() for _ in range(12)] for _ in range(2))
    for z0, z1, x0, x1 in zip(*aligned_lists(starts, datas, kind="optimal"), starts, datas, strict=True):
        assert sum(a != b for a, b in zip(z0, z1, strict=True)) == distance(x0, x1)
        assert [token for token in z0 if token != BLANK] == x0
        assert [token for token in z1 if token != BLANK] == x1


def test_an_empty_start_needs_no_dynamic_program(monkeypatch):
    monkeypatch.setattr("raydist.objectives.alignment.optimal_columns", None)
    assert aligned_lists([[], []], [[1, 2], [3]], kind="optimal") == ([[BLANK] * 2] * 2, [[1, 2], [3, BLANK]])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(sequences, sequences), min_size=1, max_size=5))
def test_01_dropping_blanks_gives_both_sequences_back(kind, pairs):
    starts, datas = zip(*pairs, strict=True)
    for z0, z1, x0, x1 in zip(*aligned_lists(starts, datas, kind=kind), starts, datas, strict=True):
        assert [token for token in z0 if token != BLANK] == x0
        assert [token for token in z1 if token != BLANK] == x1
        used = [index for index, pair in enumerate(zip(z0, z1, strict=True)) if pair != (BLANK, BLANK)]
        assert used == list(range(len(used)))


def test_optimal_alignment_does_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    firsts, seconds = rng.integers(0, 4, (7, 30)), rng.integers(0, 4, (7, 40))
    lengths = rng.integers(0, 30, 7), rng.integers(0, 40, 7)
    together = optimal_columns(firsts, seconds, first_lengths_S=lengths[0], second_lengths_S=lengths[1])
    for row in range(7):
        a, b = lengths[0][row : row + 1], lengths[1][row : row + 1]
        alone = optimal_columns(
            firsts[row : row + 1, : a[0]], seconds[row : row + 1, : b[0]], first_lengths_S=a, second_lengths_S=b
        )
        width = alone.shape[1]
        assert (together[row, :width] == alone[0]).all()
        assert (together[row, width:] == NOTHING).all()


def test_large_tables_are_worked_in_chunks(monkeypatch):
    rng = np.random.default_rng(1)
    firsts, seconds, lengths = rng.integers(0, 4, (5, 12)), rng.integers(0, 4, (5, 9)), np.full(5, 9)
    whole = optimal_columns(firsts, seconds, first_lengths_S=lengths, second_lengths_S=lengths)
    monkeypatch.setattr("raydist.objectives.levenshtein._MAX_TABLE_BYTES", 600)
    parts = optimal_columns(firsts, seconds, first_lengths_S=lengths, second_lengths_S=lengths)
    assert (whole == parts).all()


def test_padded_aligns_index_by_index():
    starts, datas = aligned_lists([[1, 2, 3], [1]], [[4], [1, 5, 6]], kind="padded")
    assert starts == [[1, 2, 3], [1, BLANK, BLANK]]
    assert datas == [[4, BLANK, BLANK], [1, 5, 6]]


def test_replace_deletes_everything_before_it_inserts():
    assert aligned_lists([[1, 2]], [[1, 2]], kind="replace") == ([[1, 2, BLANK, BLANK]], [[BLANK, BLANK, 1, 2]])


@pytest.mark.parametrize(("num_start", "num_data"), [(10, 30), (10, 3), (7, 0), (0, 5)])
def test_shuffled_substitutes_half_of_the_start(num_start, num_data):
    """The paper's noisy start: of 100 tokens 50 are substituted and 50 deleted, the rest of the data inserted."""
    starts, datas = aligned_lists([[1] * num_start], [[2] * num_data], kind="shuffled")
    pairs = list(zip(starts[0], datas[0], strict=True))
    substituted = min(num_start // 2, num_data)
    assert pairs.count((1, 2)) == substituted
    assert pairs.count((1, BLANK)) == num_start - substituted
    assert pairs.count((BLANK, 2)) == num_data - substituted


@pytest.mark.parametrize(("kind", "num_orders"), [("random", 6), ("shuffled", 6)])
def test_every_order_of_columns_is_equally_likely(kind, num_orders):
    num = 6000
    starts, datas = aligned_lists([[1, 1]] * num, [[2, 2]] * num, kind=kind)
    orders = {}
    for order in map(tuple, (zip(*pair, strict=True) for pair in zip(starts, datas, strict=True))):
        orders[order] = orders.get(order, 0) + 1
    statistic, degrees = chi_square(
        torch.tensor(list(orders.values()), dtype=torch.float64), torch.full((num_orders,), 1 / num_orders)
    )
    assert len(orders) == num_orders
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_of_equally_short_alignments_the_left_one_is_taken():
    assert aligned_lists([[1, 1]], [[1]], kind="optimal")[1][0][:2] == [1, BLANK]
    assert aligned_lists([[1]], [[2]], kind="optimal") == ([[1]], [[2]])
    starts, datas = aligned_lists([[1, 2]], [[2, 3]], kind="optimal")
    assert (starts[0][:2], datas[0][:2]) == ([1, 2], [2, 3])
