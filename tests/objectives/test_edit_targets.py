"""Noised texts and their missing edits. Numbers in test names: the invariants of arXiv 2506.09018 in our sheet."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.core.edit_model import CLOSED, FREE, OPEN
from raydist.core.terms import CrossEntropyTerm, PoissonTerm
from raydist.models.heads import evaluate_terms
from raydist.objectives.alignment import BLANK, Aligned, align
from raydist.objectives.edit_targets import (
    NO_EDIT,
    Example,
    compact,
    context_feature,
    edits_to,
    noise,
    splice_given,
)
from tests.objectives import edit_oracle as oracle
from tests.objectives.test_alignment import ragged

BEGIN = 9
TEXTS = [text for length in range(3) for text in itertools.product([0, 1], repeat=length)]
OPERATIONS = ["insert", "delete", "substitute"]


def random_weights(num, seed):
    weights = torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (weights / weights.sum()).tolist()


def aligned_columns(start, data, *, kind, seed=0):
    """One pair aligned by the code under test, as tuples with None for blanks."""
    uniforms = torch.rand(1, len(start) + len(data), generator=torch.Generator().manual_seed(seed))
    aligned = align(ragged([list(start)]), ragged([list(data)]), kind=kind, uniforms_SN=uniforms)
    sides = (aligned.start_SN[0].tolist(), aligned.data_SN[0].tolist())
    return tuple(tuple(oracle.BLANK if token == BLANK else token for token in side) for side in sides)


def coupled(kinds, *, seed=0):
    """Random laws of x0 and x1 on all texts of length <= 2, independent, with a mixture of alignments."""
    starts, datas = random_weights(len(TEXTS), seed), random_weights(len(TEXTS), seed + 1)
    return [
        (p * q / len(kinds), *aligned_columns(x0, x1, kind=kind))
        for (p, x0), (q, x1) in itertools.product(zip(starts, TEXTS, strict=True), zip(datas, TEXTS, strict=True))
        for kind in kinds
    ]


def enumerated(pairs, kappa):
    """Every flip pattern of every pair through the code under test: ``(weights, noised examples)``."""
    rows = [
        (weight * probability, z0, z1, flips)
        for weight, z0, z1 in pairs
        for _, flips, probability in oracle.patterns(z0, z1, kappa)
    ]
    width = 1 + max(len(z0) for _, z0, _, _ in rows)

    def side(symbols):
        tokens = [BEGIN, *(BLANK if symbol is None else symbol for symbol in symbols)]
        return tokens + [BLANK] * (width - len(tokens))

    start = torch.tensor([side(z0) for _, z0, _, _ in rows])
    data = torch.tensor([side(z1) for _, _, z1, _ in rows])
    flips = torch.tensor([[False, *row, *[False] * (width - 1 - len(row))] for _, _, _, row in rows])
    given_SN = torch.zeros_like(flips)
    given_SN[:, 0] = True
    example = Example(Aligned(start, data), given_SN)
    weights = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    return weights, noise(example, flipped_SN=flips, max_length=100)


def labelled_flux(pairs, kappa, *, backward=False):
    """The oracle's quantity, from the code under test."""
    weights, noised = enumerated(pairs, kappa)
    goal = noised.aligned.start_SN if backward else noised.aligned.data_SN
    edits = edits_to(goal, noised_SN=noised.noised_SN)
    texts = compact(noised.noised_SN, noised_SN=noised.noised_SN, fill=BLANK)
    rate = 1 / kappa if backward else 1 / (1 - kappa)
    result = {}
    for row, column in (edits.operation_SN != NO_EDIT).nonzero().tolist():
        text = tuple(token for token in texts[row, 1:].tolist() if token != BLANK)
        operation = OPERATIONS[edits.operation_SN[row, column]]
        symbol = None if operation == "delete" else int(edits.tokens_SN[row, column])
        key = text, (operation, int(edits.position_SN[row, column]), symbol)
        result[key] = result.get(key, 0.0) + float(weights[row]) * rate
    return result


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["optimal", "random", "padded", "shuffled", "replace"])
def test_missing_edits_equal_the_oracle_and_flip_their_column(kind, backward):
    pairs = coupled([kind])
    ours, theirs = labelled_flux(pairs, 0.3, backward=backward), oracle.labelled_flux(pairs, 0.3, backward=backward)
    assert ours.keys() == theirs.keys()
    assert all(ours[key] == pytest.approx(theirs[key], rel=1e-9) for key in theirs)
    for _, z0, z1 in pairs:
        for noised, flips, _ in oracle.patterns(z0, z1, 0.5):
            for column in range(len(flips)):
                edit = oracle.edit_of(noised, z1, column)
                flipped = (*noised[:column], z1[column], *noised[column + 1 :])
                if edit is not None:
                    assert oracle.applied(oracle.remove_blanks(noised), edit) == oracle.remove_blanks(flipped)


@pytest.mark.parametrize("kappa", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kinds", [["optimal"], ["padded", "replace"], ["optimal", "random"]])
def test_05_projected_rates_satisfy_the_kolmogorov_equation(kinds, kappa):
    """d p(x) / d kappa = inflow - outflow, rates aggregated by the text that results, and p_1 is the law of x1."""
    pairs = coupled(kinds)
    slope = oracle.law_slope(pairs, kappa)
    change = dict.fromkeys(slope, 0.0)
    for (source, target), value in oracle.flux(labelled_flux(pairs, kappa)).items():
        change[source] -= value
        change[target] += value
    assert all(change[text] == pytest.approx(slope[text], abs=1e-10) for text in slope)
    final = oracle.law(pairs, 1.0)
    for text, weight in zip(TEXTS, random_weights(len(TEXTS), 1), strict=True):
        assert final[text] == pytest.approx(weight, abs=1e-12)


@pytest.mark.parametrize("kappa", [0.2, 0.7])
def test_08_reverse_rates_balance_the_forward_ones(kappa):
    """p(x) rev(x' | x) = p(x') u(x | x'); so u + rev keeps p, and (1 + a) u + a rev generates it."""
    pairs = coupled(["optimal", "padded"])
    forward = oracle.flux(labelled_flux(pairs, kappa))
    backward = oracle.flux(labelled_flux(pairs, kappa, backward=True))
    assert forward.keys() == {(target, source) for source, target in backward}
    for (source, target), value in backward.items():
        assert value == pytest.approx(forward[target, source], rel=1e-10)
    a = 0.7
    slope = oracle.law_slope(pairs, kappa)
    change = dict.fromkeys(slope, 0.0)
    for scale, rates in ((1 + a, forward), (a, backward)):
        for (source, target), value in rates.items():
            change[source] -= scale * value
            change[target] += scale * value
    assert all(change[text] == pytest.approx(slope[text], abs=1e-10) for text in slope)


@pytest.mark.parametrize("kappa", [0.25, 0.6])
def test_03_single_datum_from_nothing(kappa):
    pairs = [(1.0, *aligned_columns((), (0, 1), kind="optimal"))]
    law = oracle.law(pairs, kappa)
    each = kappa * (1 - kappa)
    assert law == pytest.approx({(): (1 - kappa) ** 2, (0,): each, (1,): each, (0, 1): kappa**2})
    rates = {key: value / law[key[0]] * (1 - kappa) for key, value in labelled_flux(pairs, kappa).items()}
    expected = {
        ((), ("insert", 0, 0)): 1.0,
        ((), ("insert", 0, 1)): 1.0,
        ((0,), ("insert", 1, 1)): 1.0,
        ((1,), ("insert", 0, 0)): 1.0,
    }
    assert rates == pytest.approx(expected)


def test_04_length_is_binomial():
    kappa, length = 0.3, 5
    pairs = [(1.0, *aligned_columns((), (0, 1, 0, 0, 1), kind="optimal"))]
    weights, noised = enumerated(pairs, kappa)
    lengths = (noised.noised_SN != BLANK).sum(dim=1) - 1
    for k in range(length + 1):
        expected = math.comb(length, k) * kappa**k * (1 - kappa) ** (length - k)
        assert weights[lengths == k].sum().item() == pytest.approx(expected)


def test_02_nothing_is_missing_where_both_sides_agree():
    same = Aligned(torch.tensor([[BEGIN, 1, 0, BLANK]]), torch.tensor([[BEGIN, 1, 0, BLANK]]))
    given_SN = torch.tensor([[True, False, False, False]])
    noised = noise(Example(same, given_SN), flipped_SN=torch.zeros(1, 4, dtype=torch.bool), max_length=9)
    edits = edits_to(same.data_SN, noised_SN=noised.noised_SN)
    assert (edits.operation_SN == NO_EDIT).all()
    assert edits.counts(torch.ones(1, 4), length=3).sum() == 0


@pytest.mark.parametrize("backward", [False, True])
def test_10_tabular_optimum_is_the_enumerated_marginal_rate(backward):
    """A model with one row of parameters per text and place: at the oracle's rates and laws the loss has no gradient."""
    kappa, pairs = 0.35, coupled(["optimal", "replace"])
    weights, noised = enumerated(pairs, kappa)
    goal = noised.aligned.start_SN if backward else noised.aligned.data_SN
    edits = edits_to(goal, noised_SN=noised.noised_SN)
    texts = compact(noised.noised_SN, noised_SN=noised.noised_SN, fill=BLANK)
    places = sorted(
        {
            (tuple(row[: place + 1]), tuple(row))
            for row in texts.tolist()
            for place in range(len(row))
            if row[place] != BLANK
        }
    )
    number = {(row, len(head) - 1): index for index, (head, row) in enumerate(places)}
    states = torch.tensor(
        [[number.get((tuple(row), place), -1) for place in range(len(row))] for row in texts.tolist()]
    )
    real = states >= 0
    counts = edits.counts(torch.ones_like(edits.position_SN, dtype=torch.float32), length=texts.shape[1])
    wanted = (edits.operation_SN != NO_EDIT).nonzero(as_tuple=True)
    at = states[wanted[0], edits.position_SN[wanted]]
    table = {
        name: torch.full((size, len(places)), -60.0, dtype=torch.float64)
        for name, size in (("rates", 3), ("insert", 2), ("substitute", 2))
    }
    law = oracle.law(pairs, kappa)
    flux = oracle.labelled_flux(pairs, kappa, backward=backward)
    scale = kappa if backward else 1 - kappa
    marginal = torch.zeros(3, len(places), dtype=torch.float64)
    for (text, (operation, place, symbol)), value in flux.items():
        row = (BEGIN, *text, *[BLANK] * (texts.shape[1] - 1 - len(text)))
        rate = value / law[text] * scale
        marginal[OPERATIONS.index(operation), number[row, place]] += rate
        if operation != "delete":
            table[operation][symbol, number[row, place]] = math.log(rate)
    table["rates"] = marginal.log().clamp(min=-60.0)
    heads = {name: value.requires_grad_() for name, value in table.items()}
    eye = torch.eye(len(places), dtype=torch.float64)
    exposure = torch.ones_like(counts)
    terms = [
        PoissonTerm(
            name="rates",
            head="rates",
            positions_T=states[real],
            weights_T=weights[:, None].expand_as(states)[real],
            exposure_TK=exposure[real],
            counts_TK=counts[real],
        )
    ]
    for operation in ("insert", "substitute"):
        chosen = edits.operation_SN[wanted] == OPERATIONS.index(operation)
        terms.append(
            CrossEntropyTerm(
                name=operation,
                head=operation,
                positions_T=at[chosen],
                targets_T=edits.tokens_SN[wanted][chosen],
                weights_T=weights[wanted[0]][chosen],
            )
        )
    results = evaluate_terms(eye[None], terms=terms, heads=heads)
    sum(result.loss_sum for result in results).backward()
    assert marginal.max() > 0.5
    for head in heads.values():
        assert head.grad.abs().max() < 1e-7
        assert head.abs().max() > 0


def marginal_chain(pairs, start, *, num_steps):
    """Integrates the marginal rates from one text, midpoint steps in kappa."""
    law_now = {start: 1.0}

    def slope(at, kappa):
        law, rates = oracle.law(pairs, kappa), oracle.flux(oracle.labelled_flux(pairs, kappa))
        change = {}
        for (source, target), value in rates.items():
            moved = at.get(source, 0.0) * value / law[source]
            change[source] = change.get(source, 0.0) - moved
            change[target] = change.get(target, 0.0) + moved
        return change

    def moved(at, change, h):
        return {text: at.get(text, 0.0) + h * change.get(text, 0.0) for text in {*at, *change}}

    h = 1 / num_steps
    for step in range(num_steps):
        middle = (step + 0.5) * h
        half = moved(law_now, slope(law_now, max(step * h, 1e-9)), h / 2)
        law_now = moved(law_now, slope(half, middle), h)
    return law_now


def test_learned_coupling_needs_fewer_edits_than_the_training_coupling():
    """Even where training deletes and inserts everything, AA stays AA more often than it becomes BB."""
    texts = [(0, 0), (1, 1)]
    pairs = [(0.25, *aligned_columns(x0, x1, kind="replace")) for x0, x1 in itertools.product(texts, texts)]
    final = marginal_chain(pairs, (0, 0), num_steps=60)
    assert final[0, 0] + final[1, 1] == pytest.approx(1, abs=0.02)
    assert final[0, 0] > 1.2 * final[1, 1]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_given_tokens_keep_their_order_and_their_place(data):
    text = data.draw(st.lists(st.integers(0, 3), max_size=7))
    given_flags = data.draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
    start = data.draw(st.lists(st.integers(4, 6), max_size=4))
    kind = data.draw(st.sampled_from(["optimal", "random", "shuffled", "replace"]))
    free = [token for token, flag in zip(text, given_flags, strict=True) if not flag]
    given_tokens = [token for token, flag in zip(text, given_flags, strict=True) if flag]
    before = [sum(not flag for flag in given_flags[:i]) for i, flag in enumerate(given_flags) if flag]
    uniforms = torch.rand(1, len(start) + len(free), generator=torch.Generator().manual_seed(0))
    aligned = align(ragged([start]), ragged([free]), kind=kind, uniforms_SN=uniforms)
    example = splice_given(
        aligned,
        given_SG=torch.tensor([given_tokens], dtype=torch.int64),
        free_before_SG=torch.tensor([before], dtype=torch.int64),
        begin_id=BEGIN,
    )
    z0, z1, is_given = (x[0].tolist() for x in (example.aligned.start_SN, example.aligned.data_SN, example.given_SN))
    assert [token for token in z1 if token != BLANK] == [BEGIN, *text]
    assert [token for token, flag in zip(z0, is_given, strict=True) if token != BLANK and not flag] == start
    assert [a for a, flag in zip(z0, is_given, strict=True) if flag] == [BEGIN, *given_tokens]
    assert all(a == b for a, b, flag in zip(z0, z1, is_given, strict=True) if flag)
    leading = len(list(itertools.takewhile(bool, given_flags)))
    assert is_given[: 1 + leading] == [True] * (1 + leading)


def test_context_tells_where_something_may_come():
    """Prefix, two free columns of which one is blank at this time, suffix."""
    start = torch.tensor(
        [[BEGIN, 1, 2, BLANK, BLANK, 3, 4, BLANK], [BEGIN, BLANK, BLANK, BLANK, BLANK, BLANK, BLANK, BLANK]]
    )
    data = torch.tensor([[BEGIN, 1, 2, 5, 6, 3, 4, BLANK], [BEGIN, 5, BLANK, BLANK, BLANK, BLANK, BLANK, BLANK]])
    given_SN = torch.tensor([[True, True, True, False, False, True, True, False], [True] + [False] * 7])
    flipped = torch.zeros(2, 8, dtype=torch.bool)
    flipped[0, 4] = True
    noised = noise(Example(Aligned(start, data), given_SN), flipped_SN=flipped, max_length=9)
    context = compact(context_feature(noised), noised_SN=noised.noised_SN, fill=FREE)
    assert context[0].tolist() == [CLOSED, CLOSED, OPEN, FREE, CLOSED, CLOSED]
    assert context[1, 0] == OPEN


def test_a_text_that_is_too_long_loses_the_rest_of_its_columns():
    start = torch.tensor([[BEGIN, 7, BLANK, 7, BLANK, 7]])
    data = torch.tensor([[BEGIN, 1, 2, BLANK, 3, 4]])
    given_SN = torch.tensor([[True] + [False] * 5])
    noised = noise(
        Example(Aligned(start, data), given_SN), flipped_SN=torch.zeros(1, 6, dtype=torch.bool), max_length=3
    )
    assert noised.noised_SN.tolist() == [[BEGIN, 7, BLANK, 7, BLANK, BLANK]]
    edits = edits_to(noised.aligned.data_SN, noised_SN=noised.noised_SN)
    counts = edits.counts(torch.ones(1, 6), length=3)
    assert counts[0].tolist() == [[0, 0, 0], [1, 0, 1], [1, 1, 0]]
