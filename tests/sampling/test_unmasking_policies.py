"""Policies other than the entropy-bounded one, and what all of them keep: exact laws at their limits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.config.registries import UNMASKING
from raydist.core.errors import ConfigError
from raydist.sampling.drawing import PromptNoise
from raydist.sampling.unmasking.confidence import ConfidenceThreshold, Factor
from raydist.sampling.unmasking.entropy_bounded import EntropyBounded
from raydist.sampling.unmasking.first_hitting import FirstHitting
from raydist.sampling.unmasking.fixed_number import RandomOrder, TopK
from tests.sampling.oracle import chi_square, conditional, divergence, marginal, random_law, sampler_law

PROXIES = ("entropy", "confidence", "margin")
ONE_AT_A_TIME = [
    EntropyBounded(gamma=0.0),
    ConfidenceThreshold(threshold=1.0),
    Factor(factor=0.0),
    *(TopK(k=1, proxy=proxy) for proxy in PROXIES),
    RandomOrder(k=1),
    FirstHitting(),
]
ALL_AT_ONCE = [
    EntropyBounded(gamma=math.inf),
    ConfidenceThreshold(threshold=0.0),
    Factor(factor=math.inf),
    TopK(k=9),
    RandomOrder(k=9),
    FirstHitting(num_steps=1),
]
BETWEEN = [
    EntropyBounded(gamma=0.8),
    ConfidenceThreshold(threshold=0.6),
    Factor(factor=1.2),
    TopK(k=2, proxy="entropy"),
    RandomOrder(k=2),
    FirstHitting(num_steps=3),
]


def name_of(policy):
    return str(policy.name)


def state(seed, *, shape=(4, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    masked = torch.rand(shape[:2], generator=generator) < 0.7
    return logits, masked, torch.rand(shape[:2], generator=generator, dtype=torch.float64)


def revealed(policy, logits, masked, uniforms):
    return policy.reveal(logits, masked_Bk=masked, order_uniforms_Bk=uniforms)


def by_definition(policy, p, masked, uniforms):
    """Each rule for one row in plain Python; ties do not occur."""
    places = [i for i, is_masked in enumerate(masked) if is_masked]
    if not places:
        return set()
    confidence = {i: max(p[i]) for i in places}
    by_confidence = sorted(places, key=lambda i: -confidence[i])
    if policy.name == "confidence_threshold":
        return {i for i in places if confidence[i] > policy.threshold} | {by_confidence[0]}
    if policy.name == "factor":
        fitting = [
            n for n in range(1, len(places) + 1) if (n + 1) * (1 - confidence[by_confidence[n - 1]]) < policy.factor
        ]
        return set(by_confidence[: max(fitting, default=1)])
    if policy.name == "top_k":
        keys = {
            "confidence": lambda i: -confidence[i],
            "entropy": lambda i: -sum(x * math.log(x) for x in p[i]),
            "margin": lambda i: sorted(p[i])[-2] - sorted(p[i])[-1],
        }
        return set(sorted(places, key=keys[policy.proxy])[: policy.k])
    if policy.name == "random":
        return set(sorted(places, key=lambda i: uniforms[i])[: policy.k])
    interval = {i: int(uniforms[i] * policy.num_steps) for i in places}
    return {i for i in places if interval[i] == min(interval.values())}


POLICIES = st.one_of(
    st.builds(ConfidenceThreshold, threshold=st.floats(0, 1)),
    st.builds(Factor, factor=st.floats(0, 8)),
    st.builds(TopK, k=st.integers(1, 7), proxy=st.sampled_from(PROXIES)),
    st.builds(RandomOrder, k=st.integers(1, 7)),
    st.builds(FirstHitting, num_steps=st.integers(1, 9)),
)


@settings(max_examples=120, deadline=None)
@given(POLICIES, st.integers(0, 10**6))
def test_rules_equal_their_definitions(policy, seed):
    logits, masked, uniforms = state(seed)
    reveal = revealed(policy, logits, masked, uniforms)
    p = torch.softmax(logits, dim=-1).tolist()
    for row in range(4):
        expected = by_definition(policy, p[row], masked[row].tolist(), uniforms[row].tolist())
        assert set(reveal[row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("policy", [*ONE_AT_A_TIME, *ALL_AT_ONCE, *BETWEEN], ids=name_of)
def test_masked_positions_only_and_at_least_one_each_row_on_its_own(policy):
    for seed in range(20):
        logits, masked, uniforms = state(seed)
        reveal = revealed(policy, logits, masked, uniforms)
        assert not (reveal & ~masked).any()
        assert torch.equal(reveal.any(-1), masked.any(-1))
        alone = [revealed(policy, *(part[row : row + 1] for part in (logits, masked, uniforms))) for row in range(4)]
        assert torch.equal(torch.cat(alone), reveal)
        half = revealed(policy, logits.bfloat16(), masked, uniforms)
        assert torch.equal(half.any(-1), masked.any(-1))


@pytest.mark.parametrize("policy", BETWEEN, ids=name_of)
@pytest.mark.parametrize("seed", range(3))
def test_shuffled_positions_give_the_shuffled_set(policy, seed):
    logits, masked, uniforms = state(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    shuffled = revealed(policy, logits[:, order], masked[:, order], uniforms[:, order])
    assert torch.equal(shuffled, revealed(policy, logits, masked, uniforms)[:, order])


@pytest.mark.parametrize("policy", ONE_AT_A_TIME, ids=name_of)
def test_one_token_a_forward_samples_the_exact_law_in_any_order(policy):
    law = random_law((3, 3, 3), seed=1, sharpness=3.0)
    for order in itertools.permutations([0.1, 0.4, 0.9]):
        output, stats = sampler_law(law, policy=policy, order_uniforms=order)
        assert divergence(law, output) == pytest.approx(0.0, abs=1e-12)
        assert stats["steps"] == pytest.approx(3.0)


@pytest.mark.parametrize("policy", ALL_AT_ONCE, ids=name_of)
def test_all_at_once_samples_the_product_of_marginals(policy):
    law = random_law((3, 3, 3), seed=2, sharpness=3.0)
    output, stats = sampler_law(law, policy=policy, order_uniforms=(0.4, 0.9, 0.1))
    product = torch.einsum("a,b,c->abc", *[marginal(law, i) for i in range(3)])
    torch.testing.assert_close(output, product, rtol=1e-10, atol=1e-12)
    assert stats["steps"] == pytest.approx(1.0)


@pytest.mark.parametrize("policy", [*ONE_AT_A_TIME, *ALL_AT_ONCE, *BETWEEN], ids=name_of)
def test_independent_positions_are_exact_for_every_policy(policy):
    law = torch.einsum("a,b,c->abc", *[marginal(random_law((3, 3, 3), seed=s), 0) for s in range(3)])
    output, _ = sampler_law(law, policy=policy, order_uniforms=(0.4, 0.9, 0.1))
    assert divergence(law, output) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("policy", BETWEEN, ids=name_of)
def test_errors_of_dependence_add_up_to_the_divergence(policy):
    law = random_law((3, 3, 3), seed=3, sharpness=3.0)
    output, stats = sampler_law(law, policy=policy, order_uniforms=(0.4, 0.5, 0.1))
    assert 1.0 <= stats["steps"] < 3.0
    assert divergence(law, output) == pytest.approx(stats["errors"], abs=1e-9)


@pytest.mark.parametrize("policy", [RandomOrder(k=1), FirstHitting()], ids=name_of)
def test_drawn_orders_are_uniform(policy):
    noise = PromptNoise([[7]] * 3000, seed=0, device=torch.device("cpu"))
    uniforms, masked = noise.uniforms("order", 3), torch.ones(3000, 3, dtype=torch.bool)
    orders = []
    while masked.any():
        reveal = revealed(policy, torch.zeros(3000, 3, 4), masked, uniforms)
        orders.append(reveal.long().argmax(-1))
        masked = masked & ~reveal
    counts = torch.zeros(3, 3, 3, dtype=torch.float64)
    counts.index_put_(tuple(orders), torch.ones(3000, dtype=torch.float64), accumulate=True)
    possible = torch.zeros(3, 3, 3, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        possible[order] = 1 / 6
    statistic, df = chi_square(counts, possible)
    assert df == 5
    assert statistic < df + 4 * (2 * df) ** 0.5


def ancestral_law(law, *, num_steps):
    """MDLM's sampler step by step: in step s of T each masked position is revealed with probability 1 / (T - s)."""
    output = torch.zeros_like(law)

    def walk(known, step, probability):
        if len(known) == law.ndim:
            output[tuple(known[i] for i in range(law.ndim))] += probability
            return
        masked = [i for i in range(law.ndim) if i not in known]
        given, rate = conditional(law, known), 1 / (num_steps - step)
        for chosen in itertools.product([True, False], repeat=len(masked)):
            subset = [i for i, is_chosen in zip(masked, chosen, strict=True) if is_chosen]
            chance = probability * rate ** len(subset) * (1 - rate) ** (len(masked) - len(subset))
            if chance == 0:
                continue
            for values in itertools.product(*[range(law.shape[i]) for i in subset]):
                drawn = math.prod(float(marginal(given, i)[v]) for i, v in zip(subset, values, strict=True))
                walk({**known, **dict(zip(subset, values, strict=True))}, step + 1, chance * drawn)

    walk({}, 0, 1.0)
    return output


@pytest.mark.parametrize("num_steps", [2, 3])
def test_first_hitting_on_a_grid_is_the_ancestral_sampler(num_steps):
    law = random_law((2, 2, 2), seed=4, sharpness=3.0)
    output = torch.zeros_like(law)
    for intervals in itertools.product(range(num_steps), repeat=3):
        hits = [(interval + 0.5) / num_steps for interval in intervals]
        output += sampler_law(law, policy=FirstHitting(num_steps=num_steps), order_uniforms=hits)[0]
    torch.testing.assert_close(output / num_steps**3, ancestral_law(law, num_steps=num_steps), rtol=1e-9, atol=1e-12)


def test_policies_are_chosen_by_name():
    names = ["confidence_threshold", "entropy_bounded", "factor", "first_hitting", "random", "top_k"]
    assert list(UNMASKING.classes()) == names
    assert UNMASKING.parse({"name": "top_k", "k": 3}) == TopK(k=3)
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        UNMASKING.parse({"name": "confidence_threshold", "treshold": 0.5})
