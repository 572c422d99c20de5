import pytest
import torch

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.models.mask_spec import CausalMask
from tests.sampling.decoders import MASK_ID, VOCAB_SIZE, tiny_decoder, trained
from tests.sampling.oracle import OracleDecoder, chi_square, empirical_law, random_law

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [1, 2, 3]]


def sampler_of(*, stop_ids=(), mask_id=MASK_ID, seed=0, **fields):
    config = SAMPLERS.parse({"name": "autoregressive", **fields})
    return config.build(trained(stop_ids=stop_ids, mask_id=mask_id, seed=seed))


def uncached_greedy(decoder, prompt, num_tokens, *, banned=MASK_ID):
    text = list(prompt)
    for _ in range(num_tokens):
        positions = torch.arange(len(text))[None]
        logits = decoder.logits(torch.tensor([text]), positions, CausalMask(length=len(text)))[0, -1].detach().clone()
        if banned is not None:
            logits[banned] = -torch.inf
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cached_greedy_equals_uncached_greedy(family):
    decoder = tiny_decoder(family=family)
    generations = sampler_of().generate(decoder, PROMPTS, max_new_tokens=12)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        assert generation.tokens == uncached_greedy(decoder, prompt, 12)
        assert generation.num_forwards == 12
        assert generation.revealed_at == list(range(1, 13))
        assert not generation.stopped
    assert len({token for generation in generations for token in generation.tokens}) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_prompt_does_not_feel_its_batch(temperature):
    decoder = tiny_decoder()
    sampler = sampler_of(temperature=temperature, stop_ids=[0, 3], top_k=8, top_p=0.95)
    distinct = PROMPTS[:3]
    together = sampler.generate(decoder, distinct, max_new_tokens=15)
    alone = [sampler.generate(decoder, [prompt], max_new_tokens=15)[0] for prompt in distinct]
    assert together == alone
    assert together[::-1] == sampler.generate(decoder, distinct[::-1], max_new_tokens=15)


def test_equal_prompts_get_different_samples():
    generations = sampler_of(temperature=1.5).generate(tiny_decoder(), [[1, 2]] * 3, max_new_tokens=20)
    assert len({tuple(generation.tokens) for generation in generations}) == 3


def test_stop_id_ends_a_row_and_only_that_row():
    decoder = tiny_decoder()
    free = sampler_of().generate(decoder, PROMPTS, max_new_tokens=12)
    stop = free[0].tokens[4]
    stopped = sampler_of(stop_ids=[stop]).generate(decoder, PROMPTS, max_new_tokens=12)
    assert stopped[0].stopped
    for before, after in zip(free, stopped, strict=True):
        cut = before.tokens.index(stop) + 1 if stop in before.tokens else 12
        assert after.tokens == before.tokens[:cut]
        assert after.num_forwards == cut
        assert after.stopped == (stop in before.tokens)


def test_mask_token_is_never_drawn():
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.norm.weight.zero_()
    free = sampler_of(mask_id=None, temperature=1.0).generate(decoder, [[1]] * 20, max_new_tokens=20)
    assert any(MASK_ID in generation.tokens for generation in free)
    held = sampler_of(temperature=1.0).generate(decoder, [[1]] * 20, max_new_tokens=20)
    assert not any(MASK_ID in generation.tokens for generation in held)


def test_samples_follow_the_exact_law():
    law = random_law((2, 2, 2), seed=0)
    oracle = OracleDecoder(law)
    sampler = sampler_of(mask_id=oracle.mask_id, temperature=1.0)
    generations = sampler.generate(oracle, [[oracle.bos]] * 3000, max_new_tokens=3)
    statistic, df = chi_square(empirical_law([g.tokens for g in generations], law.shape), law)
    assert statistic < df + 4 * (2 * df) ** 0.5
    assert oracle.fed_tokens == [1, 1, 1]


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_equals_transformers(tmp_path, tied):
    import transformers

    from raydist.models.hf import load_decoder

    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    transformers.set_seed(0)
    peer = transformers.LlamaForCausalLM(config).eval()
    peer.save_pretrained(tmp_path / "peer")
    decoder, _ = load_decoder(str(tmp_path / "peer"))
    generations = sampler_of(mask_id=None).generate(decoder, PROMPTS, max_new_tokens=20)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        ids = torch.tensor([prompt])
        expected = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert generation.tokens == expected[0, len(prompt) :].tolist()


def test_empty_and_overlong_prompts_are_refused():
    decoder = tiny_decoder()
    with pytest.raises(ConfigError, match="a prompt has no tokens"):
        sampler_of().generate(decoder, [[1], []], max_new_tokens=4)
    with pytest.raises(ConfigError, match="61 prompt tokens"):
        sampler_of().generate(decoder, [[1] * 61], max_new_tokens=4)
    assert len(sampler_of().generate(decoder, [[1] * 60], max_new_tokens=4)[0].tokens) == 4
    assert sampler_of().generate(decoder, [], max_new_tokens=4) == []


def test_ids_that_only_pad_the_tables_are_never_drawn():
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.head.weight[9:] = 100.0 * decoder.norm.weight.new_ones(decoder.config.width)
    config = SAMPLERS.parse({"name": "autoregressive", "temperature": 1.0})
    sampler = config.build(trained(mask_id=None, vocab_size=9))
    for generation in sampler.generate(decoder, [[1], [2]], max_new_tokens=20):
        assert max(generation.tokens) < 9


@pytest.mark.parametrize("name", ["masked", "block", "discrete_flow", "edit_flow", "resample"])
@pytest.mark.parametrize("sampler", ["autoregressive", "byte_level"])
def test_models_that_predict_no_next_token_are_refused(sampler, name):
    with pytest.raises(ConfigError, match="another sampler") as caught:
        SAMPLERS.parse(sampler).build(trained(objective={"name": name}))
    assert name in caught.value.fix
