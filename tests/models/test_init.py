from __future__ import annotations

import math

import pytest
import torch

from raydist.models.decoder import Decoder
from raydist.models.init import initial_value, initialize
from raydist.models.presets import PRESETS
from tests.models.conftest import CONFIGS

BIG = (2000, 500)


def test_values_depend_on_name_and_seed_only():
    config = CONFIGS["llama3"]
    name = "blocks.1.attention.query.weight"
    value = initial_value(name, (6, 4), config=config, seed=0)
    torch.rand(3)
    assert torch.equal(value, initial_value(name, (6, 4), config=config, seed=0))
    assert not torch.equal(value, initial_value(name, (6, 4), config=config, seed=1))
    assert not torch.equal(value, initial_value(name.replace("1", "2"), (6, 4), config=config, seed=0))
    assert value.dtype == torch.float32


def test_initialize_fills_every_parameter_and_leaves_the_global_generator_alone(config):
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(math.nan)
    before = torch.get_rng_state()
    initialize(decoder, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, initial_value(name, parameter.shape, config=config, seed=3))


@pytest.mark.parametrize(
    ("preset", "name", "std", "is_cut"),
    [
        ("llama3.1-8b", "blocks.0.attention.query.weight", 0.02, True),
        ("llama3.1-8b", "blocks.7.attention.value.weight", 0.02, True),
        ("llama3.1-8b", "blocks.7.feed_forward.gate.weight", 0.02, True),
        ("llama3.1-8b", "blocks.0.attention.output.weight", 0.02 / math.sqrt(2), True),
        ("llama3.1-8b", "blocks.7.feed_forward.up.weight", 0.02 / 4, True),
        ("llama3.1-8b", "blocks.7.feed_forward.down.weight", 0.02 / 4, True),
        ("llama3.1-8b", "embedding.weight", 1.0, False),
        ("llama3.1-8b", "head.weight", 1 / 64, True),
        ("llama3.2-1b", "embedding.weight", 0.02, False),
        ("qwen3-8b", "embedding.weight", 0.02, False),
        ("qwen3-8b", "blocks.7.feed_forward.down.weight", 0.02, False),
    ],
)
def test_standard_deviations_follow_the_law(preset, name, std, is_cut):
    value = initial_value(name, BIG, config=PRESETS[preset], seed=0)
    # cutting at three deviations shrinks the deviation by the factor 0.98658
    assert value.std().item() == pytest.approx(std * (0.98658 if is_cut else 1.0), rel=5e-3)
    assert (value.abs().max().item() <= 3.0001 * std) == is_cut
    assert abs(value.mean().item()) < 5e-3 * std


@pytest.mark.parametrize(
    "name", ["norm.weight", "blocks.0.attention_norm.weight", "blocks.0.attention.key_norm.weight"]
)
def test_norms_start_at_one(name):
    assert torch.equal(initial_value(name, (5,), config=CONFIGS["qwen3"], seed=0), torch.ones(5))
