"""The entropy-bounded rule. Numbers in test names are those of the invariants of arXiv 2505.24857 in our sheet."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.sampling.unmasking.base import entropies_nats, error_proxy
from raydist.sampling.unmasking.entropy_bounded import EntropyBounded, sum_without_max
from tests.sampling.oracle import divergence, marginal, random_law, sampler_law, total_correlation

PROXIES = ("entropy", "confidence", "margin")
LN2 = math.log(2.0)


def entropy_bounded_reveal(logits, *, masked_Bk, gamma, proxy="entropy"):
    policy = EntropyBounded(gamma=gamma, proxy=proxy)
    return policy.reveal(logits, masked_Bk=masked_Bk, order_uniforms_Bk=torch.zeros(masked_Bk.shape))


def random_logits(shape, *, seed=0, scale=2.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def revealed_by_definition(logits_kV, masked_k, gamma, proxy):
    """The rule in plain Python: sort, then the longest prefix with sum - max <= gamma."""
    p = torch.softmax(logits_kV, dim=-1).tolist()
    entropies = [-sum(x * math.log(x) for x in row if x > 0) for row in p]
    errors = {
        "entropy": entropies,
        "confidence": [-max(row) for row in p],
        "margin": [sorted(row)[-2] - sorted(row)[-1] for row in p],
    }[proxy]
    order = sorted((i for i in range(len(p)) if masked_k[i]), key=lambda i: (errors[i], i))
    size = max(
        n for n in range(len(order) + 1) if n == 0 or sum(v := [entropies[i] for i in order[:n]]) - max(v) <= gamma
    )
    return set(order[:size])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 4), st.sampled_from(PROXIES))
def test_rule_equals_its_definition(seed, gamma, proxy):
    logits = random_logits((3, 6, 5), seed=seed)
    masked = torch.rand((3, 6), generator=torch.Generator().manual_seed(seed)) < 0.7
    reveal = entropy_bounded_reveal(logits, masked_Bk=masked, gamma=gamma, proxy=proxy)
    for row in range(3):
        expected = revealed_by_definition(logits[row], masked[row].tolist(), gamma, proxy)
        assert set(reveal[row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("proxy", PROXIES)
def test_01_gamma_zero_reveals_the_most_trusted_position_only(proxy):
    logits, masked = random_logits((4, 7, 9)), torch.ones(4, 7, dtype=torch.bool)
    for num_left in range(7, 0, -1):
        reveal = entropy_bounded_reveal(logits, masked_Bk=masked, gamma=0.0, proxy=proxy)
        assert reveal.sum(-1).tolist() == [1] * 4
        errors = error_proxy(logits, proxy=proxy).masked_fill(~masked, torch.inf)
        assert torch.equal(reveal.long().argmax(-1), errors.argmin(-1))
        masked = masked & ~reveal
        assert masked.sum().item() == 4 * (num_left - 1)


@pytest.mark.parametrize("proxy", PROXIES)
def test_02_gamma_infinity_reveals_everything(proxy):
    masked = torch.tensor([[True, False, True], [True, True, True]])
    reveal = entropy_bounded_reveal(random_logits((2, 3, 4)), masked_Bk=masked, gamma=math.inf, proxy=proxy)
    assert torch.equal(reveal, masked)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0, 6), min_size=2, max_size=6), st.sampled_from(PROXIES))
def test_03_larger_gamma_reveals_a_superset(seed, gammas, proxy):
    logits, masked = random_logits((1, 8, 6), seed=seed), torch.ones(1, 8, dtype=torch.bool)
    sets = [entropy_bounded_reveal(logits, masked_Bk=masked, gamma=g, proxy=proxy) for g in sorted(gammas)]
    for smaller, larger in itertools.pairwise(sets):
        assert not (smaller & ~larger).any()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(PROXIES))
def test_04_at_least_one_where_something_is_masked_and_none_elsewhere(seed, gamma, proxy):
    masked = torch.rand((5, 4), generator=torch.Generator().manual_seed(seed)) < 0.4
    reveal = entropy_bounded_reveal(random_logits((5, 4, 3), seed=seed), masked_Bk=masked, gamma=gamma, proxy=proxy)
    assert not (reveal & ~masked).any()
    assert torch.equal(reveal.any(-1), masked.any(-1))


def test_04_positions_of_zero_entropy_consume_no_budget():
    certain, fair = [0.0, -math.inf], [0.0, 0.0]
    logits = torch.tensor([[fair, certain, fair, certain, fair]], dtype=torch.float64)
    masked = torch.ones(1, 5, dtype=torch.bool)
    reveal = entropy_bounded_reveal(logits, masked_Bk=masked, gamma=0.0)
    assert reveal.tolist() == [[True, True, False, True, False]]


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 10**6), st.floats(0, 3), st.sampled_from(PROXIES))
def test_05_shuffled_positions_give_the_shuffled_set(order, seed, gamma, proxy):
    logits = random_logits((1, 6, 5), seed=seed)
    masked = torch.tensor([[True, True, False, True, True, True]])
    reveal = entropy_bounded_reveal(logits, masked_Bk=masked, gamma=gamma, proxy=proxy)
    shuffled = entropy_bounded_reveal(logits[:, order], masked_Bk=masked[:, order], gamma=gamma, proxy=proxy)
    assert torch.equal(shuffled, reveal[:, order])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 20, width=32), min_size=1, max_size=12))
def test_06_sum_without_max_is_monotone_and_right(values):
    vector = torch.tensor(values, dtype=torch.float32)
    result = sum_without_max(vector)
    assert (result.diff() >= 0).all()
    expected = [math.fsum(values[: n + 1]) - max(values[: n + 1]) for n in range(len(values))]
    torch.testing.assert_close(result.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_06_no_cancellation_hides_a_small_entropy():
    values = torch.tensor([1e-9, 5.0], dtype=torch.float32)
    assert (values.cumsum(0) - values.cummax(0).values)[1] == 0.0
    assert sum_without_max(values)[1] == pytest.approx(1e-9)


@pytest.mark.parametrize("proxy", PROXIES)
def test_07_gamma_zero_samples_the_exact_law(proxy):
    law = random_law((3, 3, 3), seed=1)
    output, stats = sampler_law(law, policy=EntropyBounded(gamma=0.0, proxy=proxy))
    assert divergence(law, output) == pytest.approx(0.0, abs=1e-12)
    assert stats["steps"] == pytest.approx(3.0)


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.8, 1.5])
def test_07_each_step_costs_at_most_gamma_and_the_costs_add_up(gamma, proxy):
    for seed in range(4):
        law = random_law((3, 3, 3), seed=seed, sharpness=3.0)
        output, stats = sampler_law(law, policy=EntropyBounded(gamma=gamma, proxy=proxy))
        assert stats["largest"] <= gamma + 1e-12
        assert divergence(law, output) == pytest.approx(stats["errors"], abs=1e-9)
        assert stats["errors"] <= gamma * stats["steps"] + 1e-9


def test_07_gamma_infinity_costs_the_total_correlation():
    law = random_law((3, 3, 3), seed=5)
    output, stats = sampler_law(law, policy=EntropyBounded(gamma=math.inf))
    assert stats["steps"] == pytest.approx(1.0)
    assert divergence(law, output) == pytest.approx(total_correlation(law, [0, 1, 2]), abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0, math.inf])
def test_08_independent_positions_are_exact_for_every_gamma(gamma):
    parts = [marginal(random_law((3, 3, 3), seed=s), 0) for s in range(3)]
    law = torch.einsum("a,b,c->abc", *parts)
    output, _ = sampler_law(law, policy=EntropyBounded(gamma=gamma))
    assert divergence(law, output) == pytest.approx(0.0, abs=1e-12)


def test_09_two_identical_fair_bits():
    law = torch.diag(torch.tensor([0.5, 0.5], dtype=torch.float64))
    output, stats = sampler_law(law, policy=EntropyBounded(gamma=LN2 - 1e-9))
    assert divergence(law, output) == pytest.approx(0.0, abs=1e-12)
    assert stats["steps"] == pytest.approx(2.0)
    output, stats = sampler_law(law, policy=EntropyBounded(gamma=LN2))
    assert divergence(law, output) == pytest.approx(LN2)
    assert stats["steps"] == pytest.approx(1.0)


def test_ties_go_to_the_earlier_position():
    logits = torch.zeros(1, 4, 3)
    reveal = entropy_bounded_reveal(logits, masked_Bk=torch.tensor([[False, True, True, True]]), gamma=0.0)
    assert reveal.tolist() == [[False, True, False, False]]


def test_entropy_is_in_nats_and_safe_at_zero_probability():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [5.0, -math.inf, -math.inf]], dtype=torch.float64)
    assert entropies_nats(logits).tolist() == pytest.approx([LN2, 0.0])


def test_half_precision_logits_are_read_in_single():
    logits = random_logits((2, 5, 7)).bfloat16()
    masked = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(
        entropy_bounded_reveal(logits, masked_Bk=masked, gamma=1.0),
        entropy_bounded_reveal(logits.float(), masked_Bk=masked, gamma=1.0),
    )
