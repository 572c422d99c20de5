from __future__ import annotations

import pytest
import torch

from raydist.config.base import validated
from raydist.core.errors import ConfigError
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.presets import PRESETS

PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items())
def test_published_parameter_counts_to_the_unit(name, expected):
    with torch.device("meta"):
        decoder = Decoder(PRESETS[name])
    assert sum(p.numel() for p in decoder.parameters()) == expected
    assert PRESETS[name].num_parameters == expected


@pytest.mark.parametrize("name", PRESETS)
def test_closed_form_counts_what_is_built(name):
    config = PRESETS[name].with_vocab(1000).model_copy(update={"num_layers": 2})
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == config.num_parameters


def test_vocabulary_grows_to_a_multiple_and_never_shrinks():
    config = PRESETS["llama3.1-8b"]
    assert config.with_vocab(100) is config
    assert config.with_vocab(128_257).vocab_size == 128_257
    assert config.with_vocab(128_257, multiple_of=64).vocab_size == 128_320
    assert PRESETS["debug"].with_vocab(1000, multiple_of=64).vocab_size == 1024


def test_heads_that_do_not_divide_are_refused():
    fields = PRESETS["debug"].model_dump() | {"num_heads": 5}
    with pytest.raises(ConfigError, match="must be a multiple of num_kv_heads=2"):
        validated(DecoderConfig, fields, prefix="model.overrides")
