"""Set Block Decoding. Numbers in test names are those of the invariants of arXiv 2509.04185 in our reference sheet;
those with an EB prefix are of arXiv 2505.24857.
"""

import math

import pytest
import torch

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.models.mask_spec import CachedMask, CausalMask
from raydist.sampling.kv_cache import KvCache
from raydist.sampling.mask_state import Window
from raydist.sampling.unmasking.entropy_bounded import EntropyBounded
from tests.sampling.decoders import MASK_ID, Recorder, tiny_decoder, trained
from tests.sampling.oracle import (
    OracleDecoder,
    chi_square,
    divergence,
    empirical_law,
    marginal,
    random_law,
    sampler_law,
    total_correlation,
)

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [3, 3]]
LN2 = math.log(2.0)


def sampler_of(*, stop_ids=(), mask_id=MASK_ID, seed=0, gamma=0.35, proxy="entropy", **fields):
    unmasking = {"name": "entropy_bounded", "gamma": gamma, "proxy": proxy}
    config = SAMPLERS.parse({"name": "set_block", "unmasking": unmasking, **fields})
    return config.build(trained(stop_ids=stop_ids, mask_id=mask_id, seed=seed))


def uncached_greedy(decoder, prompt, *, block_size, gamma, max_new_tokens, proxy="entropy"):
    """The algorithm for one prompt and without a cache. Returns the tokens and the forwards that revealed them."""
    text, revealed_at, forward = list(prompt), [], 1
    while len(text) < len(prompt) + max_new_tokens:
        size = min(block_size, len(prompt) + max_new_tokens - len(text))
        block, when = [MASK_ID] * size, [0] * size
        while MASK_ID in block:
            forward += 1
            mask = CachedMask(
                cache_lengths_B=torch.zeros(1, dtype=torch.int64), cache_width=0, num_causal=len(text), num_block=size
            )
            positions = torch.arange(len(text) + size)[None]
            logits = decoder.logits(torch.tensor([text + block]), positions, mask)[:, -size:].detach().clone()
            logits[..., MASK_ID] = -torch.inf
            masked = torch.tensor([[token == MASK_ID for token in block]])
            policy = EntropyBounded(gamma=gamma, proxy=proxy)
            chosen = policy.reveal(logits, masked_Bk=masked, order_uniforms_Bk=torch.zeros(1, size))[0]
            for place in chosen.nonzero()[:, 0].tolist():
                block[place], when[place] = int(logits[0, place].argmax()), forward
        text += block
        revealed_at += when
    return text[len(prompt) :], revealed_at


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("block_size", "gamma", "proxy"), [(4, 0.5, "entropy"), (5, 1.5, "confidence"), (1, 0.3, "margin")]
)
def test_cached_equals_uncached(family, block_size, gamma, proxy):
    decoder = tiny_decoder(family=family)
    sampler = sampler_of(block_size=block_size, gamma=gamma, proxy=proxy)
    generations = sampler.generate(decoder, PROMPTS, max_new_tokens=14)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        tokens, revealed_at = uncached_greedy(
            decoder, prompt, block_size=block_size, gamma=gamma, max_new_tokens=14, proxy=proxy
        )
        assert generation.tokens == tokens
        assert generation.revealed_at == revealed_at
        assert generation.num_forwards == max(revealed_at)
        assert MASK_ID not in tokens


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_prompt_does_not_feel_its_batch(temperature):
    decoder = tiny_decoder()
    sampler = sampler_of(block_size=4, gamma=0.8, temperature=temperature, stop_ids=[0, 2])
    together = sampler.generate(decoder, PROMPTS, max_new_tokens=18)
    assert together == [sampler.generate(decoder, [prompt], max_new_tokens=18)[0] for prompt in PROMPTS]
    assert together[::-1] == sampler.generate(decoder, PROMPTS[::-1], max_new_tokens=18)
    assert len({generation.num_forwards for generation in together}) > 1


def test_05_cache_equals_a_fresh_causal_prefill():
    decoder, sampler, prompts = tiny_decoder(), sampler_of(block_size=4, gamma=0.7), [[1, 2, 3], [4]]
    window = Window(
        tokens_Bk=torch.full((2, 4), MASK_ID),
        new_Bk=torch.ones(2, 4, dtype=torch.bool),
        token_uniforms_Bk=torch.zeros(2, 4, dtype=torch.float64),
        order_uniforms_Bk=torch.zeros(2, 4, dtype=torch.float64),
    )
    with torch.inference_mode():
        reader = sampler.start(decoder, prompts, max_new_tokens=16).reader
        cache, text = reader.cache, torch.empty(2, 0, dtype=torch.int64)
        for _ in range(3):
            finished = sampler.states.reveal(window, logits_of=reader.logits).tokens_Bk
            reader.finish(finished)
            text = torch.cat([text, finished], dim=1)
        sampler.states.reveal(window, logits_of=reader.logits)
        for row, prompt in enumerate(prompts):
            whole = torch.tensor([prompt + text[row].tolist()])
            length = whole.shape[1]
            fresh = KvCache(batch_size=1, capacity=length)
            decoder.hidden(whole, torch.arange(length)[None], CausalMask(length=length), fresh)
            fresh.commit(torch.tensor([length]))
            assert cache.lengths_B[row] == length
            for layer in range(decoder.config.num_layers):
                nothing = torch.empty(2, 2, 0, 8, dtype=torch.float64)
                for kept, expected in zip(
                    cache.extend(layer, nothing, nothing), fresh.extend(layer, nothing[:1], nothing[:1]), strict=True
                ):
                    torch.testing.assert_close(kept[row, :, :length], expected[0], rtol=1e-10, atol=1e-10)


def test_06_forward_widths_are_those_of_the_algorithm():
    """Prompt; k masks; then 2k for the first forward of a later block and k for the others; the last is ragged."""
    decoder = Recorder(tiny_decoder())
    (generation,) = sampler_of(block_size=4, gamma=0.0).generate(decoder, [[1, 2, 3]], max_new_tokens=10)
    assert decoder.widths == [3, 4, 4, 4, 4, 8, 4, 4, 4, 6, 2]
    assert generation.num_forwards == len(decoder.widths)


@pytest.mark.parametrize("gamma", [0.0, 0.6, math.inf])
def test_07_block_size_one_takes_one_forward_per_token(gamma):
    sampler = sampler_of(block_size=1, gamma=gamma)
    for generation in sampler.generate(tiny_decoder(), PROMPTS, max_new_tokens=9):
        assert generation.revealed_at == list(range(2, 11))


def test_07_block_size_one_is_autoregressive_decoding_for_an_oracle():
    law = random_law((2, 2, 2, 2), seed=4)
    oracle = OracleDecoder(law)
    prompts = [[oracle.bos]] * 50
    one = sampler_of(mask_id=oracle.mask_id, block_size=1, temperature=1.0)
    plain = SAMPLERS.parse({"name": "autoregressive", "temperature": 1.0}).build(trained(mask_id=oracle.mask_id))
    tokens = [generation.tokens for generation in one.generate(oracle, prompts, max_new_tokens=4)]
    assert tokens == [generation.tokens for generation in plain.generate(oracle, prompts, max_new_tokens=4)]
    assert len({tuple(text) for text in tokens}) > 5


@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_08_gamma_zero_takes_one_forward_per_token(block_size):
    sampler = sampler_of(block_size=block_size, gamma=0.0)
    for generation in sampler.generate(tiny_decoder(), PROMPTS, max_new_tokens=11):
        assert generation.num_forwards == 1 + 11
        assert sorted(generation.revealed_at) == list(range(2, 13))


def test_09_gamma_infinity_takes_one_forward_per_block():
    sampler = sampler_of(block_size=4, gamma=math.inf)
    for generation in sampler.generate(tiny_decoder(), PROMPTS, max_new_tokens=10):
        assert generation.revealed_at == [2] * 4 + [3] * 4 + [4] * 2
        assert generation.num_forwards == 4


def test_09_gamma_infinity_samples_the_product_of_marginals():
    law = random_law((2, 2, 2), seed=2, sharpness=3.0)
    product = torch.einsum("a,b,c->abc", *[marginal(law, i) for i in range(3)])
    statistic, df = chi_square(oracle_samples(law, gamma=math.inf, block_size=3)[0], product)
    assert statistic < df + 4 * (2 * df) ** 0.5


def oracle_samples(law, *, gamma, block_size, num=3000):
    """Counts of what the real sampler draws from the exact conditionals, and its mean forwards behind the prompt's."""
    oracle = OracleDecoder(law)
    sampler = sampler_of(mask_id=oracle.mask_id, block_size=block_size, gamma=gamma, temperature=1.0)
    generations = sampler.generate(oracle, [[oracle.bos]] * num, max_new_tokens=law.ndim)
    counts = empirical_law([generation.tokens for generation in generations], law.shape)
    return counts, sum(generation.num_forwards - 1 for generation in generations) / num


def test_10_revealing_steps_give_the_modelled_speed_up():
    """Eq. 16 with constant forward time: k / l per block, i.e. tokens over forwards behind the prompt's."""
    block_size, decoder = 4, Recorder(tiny_decoder())
    (generation,) = sampler_of(block_size=block_size, gamma=0.9).generate(decoder, [[1, 2]], max_new_tokens=16)
    steps = [len(set(generation.revealed_at[start : start + block_size])) for start in range(0, 16, block_size)]
    assert all(1 <= num_steps <= block_size for num_steps in steps)
    assert min(steps) < block_size
    assert generation.num_forwards == 1 + sum(steps)
    first, *later = [[block_size] * num_steps for num_steps in steps]
    assert decoder.widths == [2, *first, *(width for _, *others in later for width in (2 * block_size, *others))]
    assert generation.tokens_per_forward == pytest.approx(16 / (1 + sum(steps)))


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_11_gamma_zero_samples_the_exact_law(block_size):
    law = random_law((2, 2, 2), seed=3, sharpness=2.5)
    counts, num_forwards = oracle_samples(law, gamma=0.0, block_size=block_size)
    statistic, df = chi_square(counts, law)
    assert statistic < df + 4 * (2 * df) ** 0.5
    assert num_forwards == 3


@pytest.mark.parametrize(("gamma", "fewest", "most"), [(0.0, 4, 4), (0.5, 2, 4), (math.inf, 2, 2)])
def test_12_conditionally_independent_block_tokens_are_exact(gamma, fewest, most):
    """Two blocks of two: the second depends on the first, but its tokens not on each other."""
    first = torch.einsum("a,b->ab", *[marginal(random_law((2, 2), seed=s), 0) for s in (0, 1)])
    third = torch.softmax(random_law((2, 2, 2), seed=2).log(), dim=-1)
    fourth = torch.softmax(random_law((2, 2, 2), seed=3).log() * 2, dim=-1)
    law = torch.einsum("ab,abc,abd->abcd", first, third, fourth)
    counts, num_forwards = oracle_samples(law, gamma=gamma, block_size=2)
    statistic, df = chi_square(counts, law)
    assert statistic < df + 4 * (2 * df) ** 0.5
    assert fewest <= num_forwards <= most


@pytest.mark.parametrize("gamma", [0.1, 0.4, 0.7, math.inf])
def test_13_dependence_errors_are_bounded_and_add_up_to_the_divergence(gamma):
    law = random_law((3, 3, 3), seed=6, sharpness=3.0)
    output, stats = sampler_law(law, policy=EntropyBounded(gamma=gamma))
    assert stats["largest"] <= gamma + 1e-12
    assert divergence(law, output) == pytest.approx(stats["errors"], abs=1e-9)
    if gamma == math.inf:
        assert stats["errors"] == pytest.approx(total_correlation(law, [0, 1, 2]))


def test_13_the_sampler_draws_the_enumerated_law():
    law = random_law((2, 2, 2), seed=9, sharpness=3.0)
    output, _ = sampler_law(law, policy=EntropyBounded(gamma=0.5))
    counts, num_forwards = oracle_samples(law, gamma=0.5, block_size=3)
    statistic, df = chi_square(counts, output)
    assert statistic < df + 4 * (2 * df) ** 0.5
    assert 1 < num_forwards < 3


def test_14_two_correlated_fair_bits():
    law = torch.diag(torch.tensor([0.5, 0.5], dtype=torch.float64))
    counts, num_forwards = oracle_samples(law, gamma=LN2 - 1e-6, block_size=2, num=1000)
    assert num_forwards == 2
    assert counts[0, 1] == counts[1, 0] == 0
    assert abs(counts[0, 0].item() - 500) < 4 * 250**0.5
    counts, num_forwards = oracle_samples(law, gamma=LN2 + 1e-6, block_size=2, num=1000)
    assert num_forwards == 1
    statistic, df = chi_square(counts, torch.full((2, 2), 0.25, dtype=torch.float64))
    assert statistic < df + 4 * (2 * df) ** 0.5


def test_eb_10_temperature_zero_ignores_the_seed():
    decoder = tiny_decoder()
    results = [
        sampler_of(block_size=4, gamma=0.8, seed=seed).generate(decoder, PROMPTS, max_new_tokens=12) for seed in (0, 1)
    ]
    assert results[0] == results[1]
    hot = [
        sampler_of(block_size=4, gamma=0.8, seed=seed, temperature=1.0).generate(decoder, PROMPTS, max_new_tokens=12)
        for seed in (0, 1)
    ]
    assert hot[0] != hot[1]


@pytest.mark.parametrize("gamma", [0.0, 0.9, math.inf])
def test_stop_id_ends_a_row_once_everything_before_it_is_known(gamma):
    decoder = tiny_decoder()
    fields = {"block_size": 5, "gamma": gamma}
    free = sampler_of(**fields).generate(decoder, PROMPTS, max_new_tokens=15)
    for stop in range(MASK_ID):
        stopped = sampler_of(stop_ids=[stop], **fields).generate(decoder, PROMPTS, max_new_tokens=15)
        for before, after in zip(free, stopped, strict=True):
            assert after.stopped == (stop in before.tokens)
            if not after.stopped:
                assert after == before
                continue
            end = before.tokens.index(stop) + 1
            block_end = -(-end // 5) * 5
            possible = [candidate for candidate in range(end, block_end + 1) if before.tokens[candidate - 1] == stop]
            needed = min(max(before.revealed_at[:candidate]) for candidate in possible)
            assert after.tokens == before.tokens[:end]
            assert after.revealed_at == before.revealed_at[:end]
            assert after.num_forwards == needed


def test_mask_id_missing_is_refused_with_a_fix():
    with pytest.raises(ConfigError, match="mask id missing") as caught:
        sampler_of(mask_id=None)
    assert "autoregressive" in caught.value.fix
