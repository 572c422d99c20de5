from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from raydist.config.base import validated
from raydist.core.errors import ConfigError, ModelError
from raydist.core.terms import CrossEntropyTerm, PoissonTerm
from raydist.models.conditioning import sinusoidal_features
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.hf_names import is_extra
from raydist.models.init import initial_value, initialize
from raydist.models.mask_spec import CachedMask, CausalMask
from tests.models.conftest import CONFIGS, lively_decoder, random_tokens, with_extras
from tests.models.test_decoder import ConcatenatingCache

POSITIONS, MASK = torch.arange(9)[None], CausalMask(length=9)


def some_features(*shape: int) -> dict[str, torch.Tensor]:
    return {
        "offset": random_tokens(*shape, vocab_size=4, seed=3),
        "flag": random_tokens(*shape, vocab_size=2, seed=4),
    }


def some_times(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5))


def test_features_of_the_time_equal_loops():
    times = torch.tensor([[0.0, 0.25], [0.999, 1.0]])
    found = sinusoidal_features(times, num_channels=6)
    frequencies = [10_000.0 ** (-j / 3) for j in range(3)]
    for b in range(2):
        for i in range(2):
            angles = [1000.0 * times[b, i].item() * f for f in frequencies]
            expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
            assert found[b, i].tolist() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time_length", [1, 9])
def test_step_0_equals_the_base_model_bit_for_bit(config, dtype, time_length):
    base, extended = Decoder(config), Decoder(with_extras(config))
    for decoder in (base, extended):
        initialize(decoder, seed=3)
        decoder.to(dtype).reset_buffers("cpu")
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        expected = base.logits(tokens, POSITIONS, MASK)
        hidden = extended.hidden(
            tokens, POSITIONS, MASK, time_BL=some_times(2, time_length), features=some_features(2, 9)
        )
    assert torch.equal(extended.head_logits(hidden), expected)
    assert torch.equal(extended.head_logits(hidden, "insert"), expected)
    assert torch.equal(extended.head_logits(hidden, head="rates"), torch.zeros(2, 9, 3, dtype=dtype))


@pytest.mark.parametrize("name", ["llama3", "qwen3-tied"])
def test_initial_values_of_the_extras(name):
    config = with_extras(CONFIGS[name])
    decoder = Decoder(config)
    initialize(decoder, seed=3)
    assert torch.equal(decoder.extra_heads["insert"].weight, decoder.head.weight)
    network = decoder.time_embedding.inner.weight
    assert network.std().item() == pytest.approx(32**-0.5, rel=0.1)
    others = {name for name, p in decoder.named_parameters() if is_extra(name) and p.any()}
    assert others == {"time_embedding.inner.weight", "time_embedding.outer.weight", "extra_heads.insert.weight"}
    assert not torch.equal(network, decoder.time_embedding.outer.weight)
    assert torch.equal(network, initial_value("time_embedding.inner.weight", (32, 32), config=config, seed=3))


def test_the_modulated_forward_equals_its_formula():
    decoder = lively_decoder(with_extras(CONFIGS["qwen3"]), dtype=torch.float64)
    tokens, times, features = random_tokens(2, 9), some_times(2, 9), some_features(2, 9)
    branches: dict[str, list[torch.Tensor]] = {"attention": [], "feed_forward": []}
    for block in decoder.blocks:
        for name, outputs in branches.items():
            getattr(block, name).register_forward_hook(
                lambda module, args, output, outputs=outputs: outputs.append((args[0].clone(), output.clone()))
            )
    with torch.no_grad():
        found = decoder.hidden(tokens, POSITIONS, MASK, time_BL=times, features=features)
        network = decoder.time_embedding
        condition = sinusoidal_features(times, num_channels=32).double()
        for layer in (network.inner, network.outer):
            condition = F.silu(condition @ layer.weight.T + layer.bias)
        hidden = decoder.embedding.weight[tokens]
        for name, feature in features.items():
            hidden = hidden + decoder.input_features[name].weight[feature]
        for layer, block in enumerate(decoder.blocks):
            six = (condition @ block.modulation.weight.T + block.modulation.bias).split(48, dim=-1)
            for name, (scale, shift, gate) in zip(branches, (six[:3], six[3:]), strict=True):
                given, update = branches[name][layer]
                torch.testing.assert_close(given, getattr(block, f"{name}_norm")(hidden) * (1 + scale) + shift)
                hidden = hidden + (1 + gate) * update
        scale, shift = (condition @ decoder.output_modulation.weight.T + decoder.output_modulation.bias).split(48, -1)
    torch.testing.assert_close(found, decoder.norm(hidden) * (1 + scale) + shift)


def test_one_time_a_row_equals_the_same_time_at_every_token_and_is_never_repeated():
    decoder = lively_decoder(with_extras(CONFIGS["llama3"]), dtype=torch.float64)
    tokens, times, features = random_tokens(2, 9), some_times(2, 1), some_features(2, 9)
    shapes = []
    for module in (decoder.blocks[0].modulation, decoder.output_modulation):
        module.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    with torch.no_grad():
        each = decoder.logits(tokens, POSITIONS, MASK, time_BL=times.expand(2, 9), features=features)
        row = decoder.logits(tokens, POSITIONS, MASK, time_BL=times, features=features)
    assert shapes == [(2, 9), (2, 9), (2, 1), (2, 1)]
    torch.testing.assert_close(row, each, rtol=0, atol=1e-12)


def test_time_and_features_reach_the_tokens_that_may_see_them():
    decoder = lively_decoder(with_extras(CONFIGS["llama3"]), dtype=torch.float64)
    tokens, times, features = random_tokens(1, 9), some_times(1, 9), some_features(1, 9)

    def logits(times=times, features=features):
        with torch.no_grad():
            return decoder.logits(tokens, POSITIONS, MASK, time_BL=times, features=features)

    later = times.clone()
    later[0, 4] = 1 - later[0, 4]
    offset = features["offset"].clone()
    offset[0, 4] = (offset[0, 4] + 1) % 4
    for moved in (logits(times=later), logits(features={**features, "offset": offset})):
        reached = (moved - logits()).abs().amax(-1)[0] > 1e-9
        assert reached.nonzero()[:, 0].tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("time_length", [1, 9])
def test_cached_decoding_equals_the_full_forward(time_length):
    decoder = lively_decoder(with_extras(CONFIGS["qwen3"]), dtype=torch.float64)
    tokens, times, features = random_tokens(2, 9), some_times(2, time_length), some_features(2, 9)
    cache, pieces, done = ConcatenatingCache(decoder.config.num_layers), [], 0
    with torch.no_grad():
        expected = decoder.logits(tokens, POSITIONS, MASK, time_BL=times, features=features)
        for num_new in (4, 1, 4):
            new = slice(done, done + num_new)
            pieces.append(
                decoder.logits(
                    tokens[:, new],
                    POSITIONS[:, new],
                    CachedMask(cache_lengths_B=torch.full((2,), done), cache_width=done, num_causal=num_new),
                    cache,
                    time_BL=times if time_length == 1 else times[:, new],
                    features={name: feature[:, new] for name, feature in features.items()},
                )
            )
            done += num_new
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-11)


def test_every_parameter_learns():
    decoder = lively_decoder(with_extras(CONFIGS["llama3-tied"]))
    everywhere = torch.arange(18)
    terms = [
        CrossEntropyTerm(name="lm", positions_T=everywhere, targets_T=random_tokens(18)),
        CrossEntropyTerm(name="insert", positions_T=everywhere, targets_T=random_tokens(18, seed=1), head="insert"),
        PoissonTerm(
            name="rates",
            positions_T=everywhere,
            exposure_TK=torch.ones(18, 3),
            counts_TK=torch.full((18, 3), 0.5),
            head="rates",
        ),
    ]
    results = decoder(
        random_tokens(2, 9), POSITIONS, MASK, terms, time_BL=some_times(2, 1), features=some_features(2, 9)
    )
    torch.stack([result.loss_sum for result in results]).sum().backward()
    assert not [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"features": some_features(2, 9)}, r"(?s)needs a time.*expected: float32 \[B, L\] or \[B, 1\]"),
        ({"time_BL": some_times(2, 1)}, r"(?s)input features.*found:    none\n  expected: flag, offset"),
        ({"time_BL": some_times(2, 1), "features": {"flag": random_tokens(2, 9)}}, "found:    flag\n"),
        (
            {"time_BL": some_times(2, 8), "features": some_features(2, 9)},
            r"(?s)time_BL.*\[2, 8\].*\[2, 9\] or \[2, 1\]",
        ),
        ({"time_BL": some_times(2, 1), "features": some_features(2, 1)}, r"(?s)where: +offset\n.*expected: \[2, 9\]"),
    ],
)
def test_inputs_that_do_not_fit_the_model_are_refused(inputs, message):
    decoder = Decoder(with_extras(CONFIGS["llama3"]))
    with pytest.raises(ModelError, match=message):
        decoder.hidden(random_tokens(2, 9), POSITIONS, MASK, **inputs)


def test_a_plain_model_takes_neither_time_nor_features():
    decoder = Decoder(CONFIGS["llama3"])
    with pytest.raises(ModelError, match="takes no time"):
        decoder.logits(random_tokens(2, 9), POSITIONS, MASK, time_BL=some_times(2, 1))
    with pytest.raises(ModelError, match="expected: none"):
        decoder.logits(random_tokens(2, 9), POSITIONS, MASK, features=some_features(2, 9))


def test_an_unknown_head_is_named():
    decoder = Decoder(with_extras(CONFIGS["llama3"]))
    assert list(decoder.head_weights()) == ["lm", "insert", "rates"]
    with pytest.raises(ModelError, match="found:    delete\n  expected: lm, insert, rates"):
        decoder.head_logits(torch.zeros(1, 48), "delete")


def test_closed_form_counts_the_extras(config):
    with torch.device("meta"):
        decoder = Decoder(with_extras(config))
    assert sum(p.numel() for p in decoder.parameters()) == decoder.config.num_parameters
    blocks = sum(p.numel() for p in decoder.blocks[0].parameters())
    assert blocks == decoder.config.num_layer_parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_width": 33}, "time_width=33 must be even"),
        ({"extra_heads": {"lm": 0}}, "lm is the name of the language model's own head"),
        ({"extra_heads": {"a.b": 0}}, "must be an identifier"),
        ({"input_features": {"offset": 0}}, "greater than 0"),
    ],
)
def test_extras_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        validated(DecoderConfig, CONFIGS["llama3"].model_dump() | change, prefix="model.overrides")
