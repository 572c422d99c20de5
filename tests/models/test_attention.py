from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from raydist.models.attention import Attention, FlexKernel, PartsKernel, attention_kernel
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.models.mask_spec import (
    BlockDiffusionMask,
    CachedBlockMask,
    CachedMask,
    CausalMask,
    FullMask,
    MaskSpec,
    SetBlockMask,
    document_positions,
)
from raydist.models.rope import Rotation
from tests.models.conftest import CONFIGS, lively_decoder, random_tokens

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 100 + [1] * 199 + [2], [0] * 300], dtype=torch.int32)
SPECS: dict[str, MaskSpec] = {
    "causal": CausalMask(length=300),
    "causal documents": CausalMask(length=300, documents_BL=DOCUMENTS),
    "set block": SetBlockMask(length=300, block_size=7),
    "set block documents": SetBlockMask(length=300, block_size=16, documents_BL=DOCUMENTS),
    "cached": CachedMask(cache_lengths_B=torch.tensor([0, 9]), cache_width=9, num_causal=5, num_block=4),
    "full": FullMask(length=300),
    "full documents": FullMask(length=300, documents_BL=DOCUMENTS),
    "block diffusion": BlockDiffusionMask(length=300, block_size=7),
    "block diffusion documents": BlockDiffusionMask(length=300, block_size=16, documents_BL=DOCUMENTS),
    "cached block": CachedBlockMask(cache_lengths_B=torch.tensor([0, 9]), cache_width=9, num_finished=5, num_current=4),
}


def heads(spec: MaskSpec, *, num_heads: int = 4, num_kv_heads: int = 2):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, num_heads, spec.num_queries, 8, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 2, num_kv_heads, spec.num_keys, 8, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in (queries, keys, values)]


def textbook(queries, keys, values, mask):
    """Softmax over allowed keys, each key head repeated for its consecutive query heads; ``[B, Q, H, h]``."""
    repeat = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
    scores = torch.einsum("bhqc,bhkc->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
    return torch.einsum("bhqk,bhkc->bqhc", scores.masked_fill(~mask, -math.inf).softmax(-1), values)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_parts_kernel_equals_textbook_attention(spec):
    inputs = heads(spec)
    kernel = attention_kernel(spec, backend="sdpa", device=CPU, dtype=torch.float64)
    found, expected = kernel(*inputs), textbook(*inputs, spec.dense())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((found * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "name", ["causal documents", "set block", "set block documents", "full", "block diffusion documents"]
)
def test_flex_kernel_equals_parts_kernel(name):
    spec = SPECS[name]
    inputs = [x.detach().float() for x in heads(spec)]
    flex = attention_kernel(spec, backend="flex", device=CPU, dtype=torch.float32)
    parts = attention_kernel(spec, backend="sdpa", device=CPU, dtype=torch.float32)
    assert isinstance(flex, FlexKernel)
    torch.testing.assert_close(flex(*inputs), parts(*inputs), rtol=0, atol=2e-6)


def test_decoding_never_uses_flex():
    kernel = attention_kernel(SPECS["cached"], backend="flex", device=CPU, dtype=torch.float32)
    assert isinstance(kernel, PartsKernel)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_decoder_on_flex_equals_decoder_on_sdpa():
    decoder = lively_decoder(CONFIGS["qwen3"])
    on_flex = Decoder(decoder.config, attention="flex")
    on_flex.load_state_dict(decoder.state_dict())
    documents = torch.tensor([[0] * 9 + [1] * 11, [0] * 20], dtype=torch.int32)
    spec = SetBlockMask(length=20, block_size=4, documents_BL=documents)
    positions = document_positions(documents).repeat(1, 2)
    with torch.no_grad():
        found, expected = (model.logits(random_tokens(2, 40), positions, spec) for model in (on_flex, decoder))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_grouped_heads_with_repeated_weights_equal_multi_head_attention():
    grouped_config = CONFIGS["llama3"]
    full_config = grouped_config.model_copy(update={"num_kv_heads": grouped_config.num_heads})
    grouped, full = Decoder(grouped_config), Decoder(full_config)
    initialize(grouped, 0)
    state = grouped.state_dict()
    repeat = grouped_config.num_heads // grouped_config.num_kv_heads
    for name, value in state.items():
        if name.endswith(("attention.key.weight", "attention.value.weight")):
            per_head = value.unflatten(0, (grouped_config.num_kv_heads, -1))
            state[name] = per_head.repeat_interleave(repeat, 0).flatten(0, 1)
    full.load_state_dict(state)
    tokens, positions = random_tokens(2, 12), torch.arange(12)[None]
    with torch.no_grad():
        found, expected = (m.logits(tokens, positions, CausalMask(length=12)) for m in (grouped, full))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_qk_norm_forgets_the_scale_of_the_query_projection():
    decoder = lively_decoder(CONFIGS["qwen3"], dtype=torch.float64)
    tokens, positions, mask = random_tokens(2, 12), torch.arange(12)[None], CausalMask(length=12)
    with torch.no_grad():
        before = decoder.logits(tokens, positions, mask)
        for block in decoder.blocks:
            block.attention.query.weight *= 37.0
        after = decoder.logits(tokens, positions, mask)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    without = lively_decoder(CONFIGS["llama3"], dtype=torch.float64)
    with torch.no_grad():
        before = without.logits(tokens, positions, mask)
        without.blocks[0].attention.query.weight *= 37.0
        assert (without.logits(tokens, positions, mask) - before).abs().max() > 0.1


def test_rotary_layouts_agree_under_the_row_permutation():
    """Rotating adjacent pairs equals ours with the rows of a head in the order 0, 2, ..., 1, 3."""
    config = CONFIGS["llama3"]
    attention = Attention(config, layer=0)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(attention.query.weight.shape, generator=generator)
    hidden = torch.randn(1, 10, config.width, generator=generator)
    frequencies = torch.rand(config.head_dim // 2, generator=generator)
    order = torch.cat((torch.arange(0, config.head_dim, 2), torch.arange(1, config.head_dim, 2)))
    permuted = weight.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1)

    def project(w: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, w).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    rotation = Rotation.at(torch.arange(10)[None], frequencies=frequencies)
    ours = rotation.apply(project(permuted))
    as_complex = torch.view_as_complex(project(weight).unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones(10, len(frequencies)), torch.arange(10)[:, None] * frequencies)
    theirs = torch.view_as_real(as_complex * turn).flatten(-2)
    torch.testing.assert_close(ours, theirs[..., order], rtol=0, atol=1e-5)


def test_head_width_is_free_of_the_model_width():
    config = DecoderConfig.model_validate(CONFIGS["qwen3"].model_dump() | {"head_dim": 32})
    assert config.num_heads * config.head_dim != config.width
    decoder = lively_decoder(config)
    with torch.no_grad():
        logits = decoder.logits(random_tokens(1, 5), torch.arange(5)[None], CausalMask(length=5))
    assert logits.shape == (1, 5, config.vocab_size)
