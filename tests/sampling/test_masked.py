"""The full-sequence sampler of mask states. Numbers in test names with an EB prefix are those of the invariants of
arXiv 2505.24857 in our reference sheet (those of the rule alone are in test_unmasking.py).
"""

import itertools
import math

import pytest
import torch

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.models.mask_spec import FullMask
from raydist.sampling import mask_state
from raydist.sampling.unmasking.entropy_bounded import EntropyBounded
from tests.sampling.decoders import MASK_ID, check_stopped, tiny_decoder, trained
from tests.sampling.oracle import (
    OracleDecoder,
    agrees,
    conditional,
    divergence,
    empirical_law,
    marginal,
    random_law,
    sampler_law,
    total_correlation,
)

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [3, 3]]
LN2 = math.log(2.0)
POLICIES = [
    {"name": "entropy_bounded", "gamma": 1.0},
    {"name": "confidence_threshold", "threshold": 0.6},
    {"name": "factor", "factor": 1.5},
    {"name": "top_k", "k": 3},
    {"name": "random", "k": 2},
    {"name": "first_hitting"},
    {"name": "first_hitting", "num_steps": 4},
]
ONE_AT_A_TIME = [
    {"name": "entropy_bounded", "gamma": 0.0},
    {"name": "confidence_threshold", "threshold": 1.0},
    {"name": "factor", "factor": 0.0},
    {"name": "top_k"},
    {"name": "random"},
    {"name": "first_hitting"},
]


def name_of(value):
    return value["name"] if isinstance(value, dict) else str(value)


def bounded(gamma, proxy="entropy"):
    return {"name": "entropy_bounded", "gamma": gamma, "proxy": proxy}


def sampler_of(*, stop_ids=(), mask_id=MASK_ID, seed=0, objective=None, **fields):
    config = SAMPLERS.parse({"name": "masked", **fields})
    return config.build(trained(stop_ids=stop_ids, mask_id=mask_id, seed=seed, objective=objective))


def oracle_samples(law, *, num=1000, shift=False, **fields):
    """Counts of what the sampler draws from exact conditionals behind a one-token prompt, and its mean forwards."""
    oracle = OracleDecoder(law, shift=shift)
    sampler = sampler_of(mask_id=oracle.mask_id, temperature=1.0, shift=shift, **fields)
    generations = sampler.generate(oracle, [[oracle.bos]] * num, max_new_tokens=law.ndim)
    counts = empirical_law([generation.tokens for generation in generations], law.shape)
    return counts, sum(generation.num_forwards for generation in generations) / num


def greedy(decoder, prefix, suffix, *, num_new_tokens, policy, block_size, shift):
    """The algorithm for one text, written plainly. Returns the gap's tokens and the forwards that revealed them."""
    text, when = [*prefix, *[MASK_ID] * num_new_tokens, *suffix], [0] * num_new_tokens
    forward, start = 0, len(prefix)
    for first in range(0, num_new_tokens, block_size or num_new_tokens):
        window = range(start + first, start + min(first + (block_size or num_new_tokens), num_new_tokens))
        while any(text[i] == MASK_ID for i in window):
            forward += 1
            logits = decoder.logits(torch.tensor([text]), torch.arange(len(text))[None], FullMask(length=len(text)))
            block = torch.stack([logits[0, i - int(shift)] for i in window])[None].detach()
            block[..., MASK_ID] = -torch.inf
            masked = torch.tensor([[text[i] == MASK_ID for i in window]])
            chosen = policy.reveal(block, masked_Bk=masked, order_uniforms_Bk=torch.zeros(1, len(window)))[0]
            for place in chosen.nonzero()[:, 0].tolist():
                text[window[place]], when[window[place] - start] = int(block[0, place].argmax()), forward
    return text[start : start + num_new_tokens], when


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("block_size", "gamma", "proxy"), [(None, 2.0, "entropy"), (4, 1.0, "confidence")])
def test_the_batch_equals_the_algorithm_for_one_text(shift, block_size, gamma, proxy):
    decoder = tiny_decoder()
    sampler = sampler_of(unmasking=bounded(gamma, proxy), block_size=block_size, shift=shift)
    policy = EntropyBounded(gamma=gamma, proxy=proxy)
    settings = {"policy": policy, "block_size": block_size, "shift": shift}
    generations = sampler.generate(decoder, PROMPTS, max_new_tokens=10)
    assert sum(generation.num_forwards for generation in generations) < 40
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        tokens, revealed_at = greedy(decoder, prompt, [], num_new_tokens=10, **settings)
        assert (generation.tokens, generation.revealed_at) == (tokens, revealed_at)
        assert generation.num_forwards == max(revealed_at)
    suffixes = [[9], [], [2, 2, 2], [1, 5]]
    filled = sampler.infill(decoder, PROMPTS, suffixes, num_new_tokens=5)
    for prefix, suffix, generation in zip(PROMPTS, suffixes, filled, strict=True):
        tokens, revealed_at = greedy(decoder, prefix, suffix, num_new_tokens=5, **settings)
        assert (generation.tokens, generation.revealed_at) == (tokens, revealed_at)


@pytest.mark.parametrize("unmasking", POLICIES, ids=name_of)
@pytest.mark.parametrize(("temperature", "block_size"), [(0.0, None), (1.3, 5)])
def test_a_prompt_does_not_feel_its_batch_and_no_mask_stays(unmasking, temperature, block_size):
    decoder = tiny_decoder()
    sampler = sampler_of(unmasking=unmasking, temperature=temperature, block_size=block_size, stop_ids=[0, 2])
    together = sampler.generate(decoder, PROMPTS, max_new_tokens=12)
    assert together == [sampler.generate(decoder, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together[::-1] == sampler.generate(decoder, PROMPTS[::-1], max_new_tokens=12)
    for generation in together:
        assert MASK_ID not in generation.tokens
        assert all(1 <= forward <= generation.num_forwards for forward in generation.revealed_at)


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("unmasking", ONE_AT_A_TIME, ids=name_of)
def test_one_token_a_forward_samples_the_exact_law(unmasking, block_size):
    law = random_law((2, 2, 2), seed=3, sharpness=2.5)
    counts, num_forwards = oracle_samples(law, unmasking=unmasking, block_size=block_size)
    assert agrees(counts, law)
    assert num_forwards == 3


def test_the_shifted_read_out_samples_the_exact_law():
    law = random_law((3, 3, 3), seed=4, sharpness=2.5)
    counts, _ = oracle_samples(law, unmasking={"name": "random"}, shift=True)
    assert agrees(counts, law)


def test_blocks_of_one_token_are_autoregressive_decoding_for_an_oracle():
    law = random_law((2, 2, 2, 2), seed=4)
    oracle = OracleDecoder(law)
    prompts = [[oracle.bos]] * 50
    one = sampler_of(mask_id=oracle.mask_id, block_size=1, temperature=1.0)
    plain = SAMPLERS.parse({"name": "autoregressive", "temperature": 1.0}).build(trained(mask_id=oracle.mask_id))
    tokens = [generation.tokens for generation in one.generate(oracle, prompts, max_new_tokens=4)]
    assert tokens == [generation.tokens for generation in plain.generate(oracle, prompts, max_new_tokens=4)]
    assert len({tuple(text) for text in tokens}) > 5


def test_infilling_samples_the_law_given_both_sides():
    law = random_law((2, 2, 2, 2), seed=5, sharpness=2.5)
    oracle = OracleDecoder(law)
    sampler = sampler_of(mask_id=oracle.mask_id, temperature=1.0, unmasking={"name": "random"})
    filled = sampler.infill(oracle, [[oracle.bos, 1]] * 1500, [[0]] * 1500, num_new_tokens=2)
    counts = empirical_law([generation.tokens for generation in filled], (2, 2))
    assert agrees(counts, conditional(law, {0: 1, 3: 0})[1, :, :, 0])


@pytest.mark.parametrize("proxy", ["entropy", "confidence", "margin"])
def test_eb_01_gamma_zero_takes_one_forward_per_token(proxy):
    sampler = sampler_of(unmasking=bounded(0.0, proxy))
    for generation in sampler.generate(tiny_decoder(), PROMPTS, max_new_tokens=9):
        assert sorted(generation.revealed_at) == list(range(1, 10))
    top_1 = sampler_of(unmasking={"name": "top_k", "proxy": proxy})
    assert top_1.generate(tiny_decoder(), PROMPTS, max_new_tokens=9) == sampler.generate(
        tiny_decoder(), PROMPTS, max_new_tokens=9
    )


def test_eb_02_gamma_infinity_takes_one_forward():
    for generation in sampler_of(unmasking=bounded(math.inf)).generate(tiny_decoder(), PROMPTS, max_new_tokens=9):
        assert generation.num_forwards == 1
        assert generation.revealed_at == [1] * 9


def test_eb_03_a_larger_gamma_reveals_more_in_the_first_forward():
    numbers = []
    for gamma in (0.0, 0.5, 1.0, 2.0, 4.0, math.inf):
        generations = sampler_of(unmasking=bounded(gamma)).generate(tiny_decoder(), PROMPTS, max_new_tokens=12)
        numbers.append([generation.revealed_at.count(1) for generation in generations])
    assert numbers[0] == [1] * 4
    assert numbers[-1] == [12] * 4
    assert all(later >= earlier for row in zip(*numbers, strict=True) for earlier, later in itertools.pairwise(row))


def test_eb_04_certain_positions_go_with_an_uncertain_one():
    """At a gamma that is nothing but the e^-50 that the oracle leaves to the bos token."""
    fair, certain = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    law = torch.einsum("a,b,c,d->abcd", fair, certain, fair, certain)
    counts, num_forwards = oracle_samples(law, unmasking=bounded(1e-15), num=600)
    assert num_forwards == 2
    assert agrees(counts, law)


@pytest.mark.parametrize("gamma", [0.0, 0.4, math.inf])
def test_eb_07_the_sampler_draws_the_enumerated_law(gamma):
    law = random_law((2, 2, 2), seed=9, sharpness=3.0)
    output, stats = sampler_law(law, policy=EntropyBounded(gamma=gamma))
    counts, num_forwards = oracle_samples(law, unmasking=bounded(gamma))
    assert agrees(counts, output)
    assert num_forwards == pytest.approx(stats["steps"], abs=0.1)
    assert stats["largest"] <= gamma + 1e-12
    expected = {0.0: 0.0, math.inf: total_correlation(law, [0, 1, 2])}.get(gamma, stats["errors"])
    assert divergence(law, output) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.7, math.inf])
def test_eb_08_independent_positions_are_exact(gamma):
    law = torch.einsum("a,b,c->abc", *[marginal(random_law((3, 3, 3), seed=s), 0) for s in range(3)])
    assert agrees(oracle_samples(law, unmasking=bounded(gamma))[0], law)


def test_eb_09_two_identical_fair_bits():
    law = torch.diag(torch.tensor([0.5, 0.5], dtype=torch.float64))
    counts, num_forwards = oracle_samples(law, unmasking=bounded(LN2 - 1e-6), num=1000)
    assert num_forwards == 2
    assert agrees(counts, law)
    counts, num_forwards = oracle_samples(law, unmasking=bounded(LN2 + 1e-6), num=1000)
    assert num_forwards == 1
    assert agrees(counts, torch.full((2, 2), 0.25, dtype=torch.float64))


def test_eb_10_temperature_zero_ignores_the_seed():
    decoder, fields = tiny_decoder(), {"unmasking": bounded(1.0)}
    cold = [sampler_of(seed=seed, **fields).generate(decoder, PROMPTS, max_new_tokens=8) for seed in (0, 1)]
    hot = [
        sampler_of(seed=seed, temperature=1.0, **fields).generate(decoder, PROMPTS, max_new_tokens=8) for seed in (0, 1)
    ]
    assert cold[0] == cold[1]
    assert hot[0] != hot[1]


@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_a_stop_id_ends_a_row_once_everything_before_it_is_known(gamma, block_size):
    decoder, fields = tiny_decoder(), {"unmasking": bounded(gamma), "block_size": block_size}
    free = sampler_of(**fields).generate(decoder, PROMPTS, max_new_tokens=15)
    num_stopped = 0
    for stop in range(MASK_ID):
        stopped = sampler_of(stop_ids=[stop], **fields).generate(decoder, PROMPTS, max_new_tokens=15)
        num_stopped += check_stopped(free, stopped, stop=stop)
    assert num_stopped > 4


def test_a_stop_id_inside_a_gap_is_a_token_like_others():
    decoder = tiny_decoder()
    stopping = sampler_of(stop_ids=range(MASK_ID)).infill(decoder, PROMPTS, [[1]] * 4, num_new_tokens=6)
    assert stopping == sampler_of().infill(decoder, PROMPTS, [[1]] * 4, num_new_tokens=6)
    assert [len(generation.tokens) for generation in stopping] == [6] * 4


def test_rows_of_the_head_beyond_the_vocabulary_are_never_drawn():
    """A base model may have more embedding rows than its tokenizer has tokens."""
    config = SAMPLERS.parse({"name": "masked", "temperature": 5.0, "unmasking": {"name": "top_k", "k": 4}})
    sampler = config.build(trained(vocab_size=5, mask_id=4))
    generations = sampler.generate(tiny_decoder(), [[1]] * 20, max_new_tokens=12)
    assert {token for generation in generations for token in generation.tokens} == {0, 1, 2, 3}


def test_a_forward_renders_no_mask_and_draws_no_token_that_it_does_not_need(monkeypatch):
    """The mask of a block is made once; only revealed positions are drawn."""
    decoder, masks, num_drawn = tiny_decoder(), [], []
    plain_hidden, plain_draw = decoder.hidden, mask_state.draw_tokens

    def hidden(tokens_BL, positions_BL, mask):
        masks.append(mask)
        return plain_hidden(tokens_BL, positions_BL, mask)

    def draw(logits, **settings):
        num_drawn.append(logits.shape[:-1].numel())
        return plain_draw(logits, **settings)

    monkeypatch.setattr(decoder, "hidden", hidden)
    monkeypatch.setattr(mask_state, "draw_tokens", draw)
    sampler = sampler_of(unmasking={"name": "top_k", "k": 2}, block_size=6, temperature=1.0)
    sampler.generate(decoder, PROMPTS, max_new_tokens=12)
    assert (len(masks), len({id(mask) for mask in masks})) == (6, 2)
    assert num_drawn == [2 * len(PROMPTS)] * 6


def test_nothing_to_do():
    assert sampler_of().generate(tiny_decoder(), [], max_new_tokens=3) == []


def test_the_shift_is_that_of_the_training():
    assert sampler_of(objective={"name": "masked", "shift": True}).shift
    assert not sampler_of(objective={"name": "masked", "shift": True}, shift=False).shift
    assert not sampler_of(objective={"name": "my_own"}).shift


def test_mistakes_are_refused_with_a_fix():
    with pytest.raises(ConfigError, match="mask id missing"):
        sampler_of(mask_id=None)
    with pytest.raises(ConfigError, match="finite number"):
        sampler_of(temperature=math.inf)
    with pytest.raises(ConfigError, match="trained for another sampler") as caught:
        sampler_of(objective={"name": "set_block"})
    assert caught.value.fix == "use --sampler set_block"
    flow = {"name": "discrete_flow", "path": {"name": "mixture", "source": {"name": "mask"}}}
    assert sampler_of(objective=flow)
    for path in ({"name": "mixture", "source": {"name": "uniform"}}, {"name": "metric"}):
        with pytest.raises(ConfigError, match="noise that is no mask"):
            sampler_of(objective={**flow, "path": path})
    with pytest.raises(ConfigError, match="a gap at the start"):
        sampler_of(shift=True).infill(tiny_decoder(), [[]], [[1]], num_new_tokens=2)
    with pytest.raises(ConfigError, match="longer than the model's positions"):
        sampler_of().infill(tiny_decoder(), [[1]], [[1]], num_new_tokens=63)
    with pytest.raises(ConfigError, match="longer than the model's positions"):
        sampler_of().generate(tiny_decoder(), [[1, 2]], max_new_tokens=63)
