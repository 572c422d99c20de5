"""Block diffusion decoding: its cache, its grid of blocks, its laws."""

import math

import pytest
import torch

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.models.mask_spec import BlockDiffusionMask
from raydist.sampling.unmasking.entropy_bounded import EntropyBounded
from tests.sampling.decoders import MASK_ID, Recorder, check_stopped, tiny_decoder, trained
from tests.sampling.oracle import OracleDecoder, agrees, conditional, empirical_law, marginal, random_law

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [3, 3, 8, 2]]


def bounded(gamma):
    return {"name": "entropy_bounded", "gamma": gamma}


def sampler_of(*, stop_ids=(), mask_id=MASK_ID, seed=0, objective=None, **fields):
    config = SAMPLERS.parse({"name": "block", **fields})
    return config.build(trained(stop_ids=stop_ids, mask_id=mask_id, seed=seed, objective=objective))


def uncached_greedy(decoder, prompt, *, block_size, gamma, max_new_tokens, shift):
    """One prompt, with the doubled sequence and the mask of training in place of a cache."""
    end = len(prompt) + max_new_tokens
    length = -(-end // block_size) * block_size
    text = [*prompt, *[MASK_ID] * (length - len(prompt))]
    when, forward = [0] * length, int(len(prompt) >= block_size)
    policy, mask = EntropyBounded(gamma=gamma), BlockDiffusionMask(length=length, block_size=block_size)
    positions = torch.arange(length).repeat(2)[None]
    for start in range(len(prompt) // block_size * block_size, length, block_size):
        block = range(start, start + block_size)
        while any(text[i] == MASK_ID for i in block if i < end):
            forward += 1
            logits = decoder.logits(torch.tensor([text + text]), positions, mask)[0].detach()
            read_at = [length + i for i in block]
            if shift:
                read_at = [start - 1, *[length + i - 1 for i in block[1:]]]
            picked = logits[read_at][None]
            picked[..., MASK_ID] = -torch.inf
            masked = torch.tensor([[text[i] == MASK_ID and i < end for i in block]])
            if shift and masked[0, 0]:
                masked[0, 1:] = False
            chosen = policy.reveal(picked, masked_Bk=masked, order_uniforms_Bk=torch.zeros(1, block_size))[0]
            for place in chosen.nonzero()[:, 0].tolist():
                text[start + place], when[start + place] = int(picked[0, place].argmax()), forward
    return text[len(prompt) : end], when[len(prompt) : end]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("block_size", "gamma"), [(1, 0.5), (3, 1.0), (4, 2.0)])
def test_cached_equals_uncached_with_the_attention_of_training(family, shift, block_size, gamma):
    decoder = tiny_decoder(family=family)
    sampler = sampler_of(block_size=block_size, unmasking=bounded(gamma), shift=shift)
    generations = sampler.generate(decoder, PROMPTS, max_new_tokens=11)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        tokens, revealed_at = uncached_greedy(
            decoder, prompt, block_size=block_size, gamma=gamma, max_new_tokens=11, shift=shift
        )
        assert generation.tokens == tokens
        assert generation.revealed_at == revealed_at
        assert generation.num_forwards == max(revealed_at)
        assert MASK_ID not in tokens


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("unmasking", [bounded(1.0), {"name": "random", "k": 2}, {"name": "first_hitting"}], ids=str)
def test_a_prompt_does_not_feel_its_batch(temperature, unmasking):
    decoder = tiny_decoder()
    sampler = sampler_of(block_size=4, unmasking=unmasking, temperature=temperature, stop_ids=[0, 2], shift=True)
    together = sampler.generate(decoder, PROMPTS, max_new_tokens=18)
    assert together == [sampler.generate(decoder, [prompt], max_new_tokens=18)[0] for prompt in PROMPTS]
    assert together[::-1] == sampler.generate(decoder, PROMPTS[::-1], max_new_tokens=18)
    assert not any(MASK_ID in generation.tokens for generation in together)


def test_shifted_blocks_of_one_token_are_autoregressive_decoding():
    decoder = tiny_decoder()
    plain = SAMPLERS.parse("autoregressive").build(trained()).generate(decoder, PROMPTS, max_new_tokens=9)
    blocks = sampler_of(block_size=1, shift=True).generate(decoder, PROMPTS, max_new_tokens=9)
    for one, other in zip(blocks, plain, strict=True):
        assert one.tokens == other.tokens
        assert one.num_forwards == other.num_forwards + 1


def test_forward_widths_are_those_of_the_algorithm():
    """Whole blocks of the prompt; a block; then two blocks for the first forward of a later one."""
    decoder = Recorder(tiny_decoder())
    sampler = sampler_of(block_size=4, unmasking=bounded(0.0))
    (generation,) = sampler.generate(decoder, [[1, 2, 3, 4, 5, 6]], max_new_tokens=5)
    assert decoder.widths == [4, 4, 4, 8, 4, 4]
    assert generation.num_forwards == 6
    assert sorted(generation.revealed_at) == [2, 3, 4, 5, 6]


def test_a_prompt_shorter_than_a_block_costs_no_forward():
    decoder = Recorder(tiny_decoder())
    (generation,) = sampler_of(block_size=4, unmasking=bounded(math.inf)).generate(decoder, [[1]], max_new_tokens=7)
    assert decoder.widths == [4, 8]
    assert generation.revealed_at == [1] * 3 + [2] * 4


@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_gamma_zero_takes_one_forward_per_token(block_size):
    sampler = sampler_of(block_size=block_size, unmasking=bounded(0.0))
    for prompt, generation in zip(PROMPTS, sampler.generate(tiny_decoder(), PROMPTS, max_new_tokens=10), strict=True):
        assert generation.num_forwards == 10 + (len(prompt) >= block_size)


def oracle_samples(law, *, num=1000, shift=False, **fields):
    oracle = OracleDecoder(law, shift=shift)
    sampler = sampler_of(mask_id=oracle.mask_id, temperature=1.0, shift=shift, **fields)
    generations = sampler.generate(oracle, [[oracle.bos]] * num, max_new_tokens=law.ndim)
    return empirical_law([generation.tokens for generation in generations], law.shape)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_one_token_a_forward_samples_the_exact_law(block_size, shift):
    law = random_law((2, 2, 2), seed=3, sharpness=2.5)
    assert agrees(oracle_samples(law, block_size=block_size, unmasking={"name": "random"}, shift=shift), law)


@pytest.mark.parametrize("unmasking", [bounded(math.inf), {"name": "random", "k": 4}], ids=str)
def test_with_a_shift_the_first_token_of_a_block_comes_first(unmasking):
    sampler = sampler_of(block_size=4, unmasking=unmasking, shift=True)
    (generation,) = sampler.generate(tiny_decoder(), [[1, 2, 3, 4, 5]], max_new_tokens=7)
    assert generation.revealed_at == [2] * 3 + [3] + [4] * 3


def test_all_at_once_samples_products_inside_blocks():
    """The text is [bos, 0 | 1, 2 | 3, -]: the second block's tokens are independent of each other given the first."""
    law = random_law((2, 2, 2, 2), seed=6, sharpness=3.0)
    expected = torch.zeros_like(law)
    for a in range(2):
        given_a = conditional(law, {0: a})
        for b in range(2):
            for c in range(2):
                pair = marginal(law, 0)[a] * marginal(given_a, 1)[b] * marginal(given_a, 2)[c]
                expected[a, b, c] = pair * marginal(conditional(law, {0: a, 1: b, 2: c}), 3)
    assert agrees(oracle_samples(law, block_size=2, unmasking=bounded(math.inf)), expected)


@pytest.mark.parametrize("gamma", [0.0, math.inf])
def test_a_stop_id_ends_a_row_once_everything_before_it_is_known(gamma):
    decoder, fields = tiny_decoder(), {"unmasking": bounded(gamma), "block_size": 5}
    free = sampler_of(**fields).generate(decoder, PROMPTS, max_new_tokens=15)
    num_stopped = 0
    for stop in range(MASK_ID):
        stopped = sampler_of(stop_ids=[stop], **fields).generate(decoder, PROMPTS, max_new_tokens=15)
        num_stopped += check_stopped(free, stopped, stop=stop)
    assert num_stopped > 4


def test_block_size_and_shift_are_those_of_the_training():
    sampler = sampler_of(objective={"name": "block", "block_size": 6, "shift": True})
    assert (sampler.block_size, sampler.shift) == (6, True)
    sampler = sampler_of(objective={"name": "block", "block_size": 6, "shift": True}, block_size=3, shift=False)
    assert (sampler.block_size, sampler.shift) == (3, False)


def test_mistakes_are_refused_with_a_fix():
    with pytest.raises(ConfigError, match="mask id missing"):
        sampler_of(mask_id=None, block_size=4)
    with pytest.raises(ConfigError, match="trained for another sampler") as caught:
        sampler_of(objective={"name": "masked"})
    assert caught.value.fix == "use --sampler masked"
    with pytest.raises(ConfigError, match="block size is not known") as caught:
        sampler_of()
    assert caught.value.fix == "set it: block_size=16"
