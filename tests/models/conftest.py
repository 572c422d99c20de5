from __future__ import annotations

import pytest
import torch

from raydist.models.config import DecoderConfig, RopeScaling
from raydist.models.decoder import Decoder
from raydist.models.hf_names import is_extra
from raydist.models.init import initialize

_SIZES = {
    "vocab_size": 101,
    "num_layers": 3,
    "width": 48,
    "hidden_width": 80,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_positions": 64,
}
# the scaled frequencies of a head of 16 channels fall on all three branches of the rule
_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=512)
CONFIGS = {
    "llama3": DecoderConfig(family="llama", **_SIZES),
    "llama3-tied": DecoderConfig(family="llama", tied_embeddings=True, **_SIZES),
    "llama3.1": DecoderConfig(family="llama", rope_scaling=_SCALING, **_SIZES),
    "qwen3": DecoderConfig(family="qwen3", norm_eps=1e-6, rope_theta=1e6, **_SIZES),
    "qwen3-tied": DecoderConfig(family="qwen3", norm_eps=1e-6, rope_theta=1e6, tied_embeddings=True, **_SIZES),
}


def with_extras(config: DecoderConfig) -> DecoderConfig:
    """The decoder with every extra input and head."""
    return config.model_copy(
        update={
            "time_input": True,
            "time_width": 32,
            "extra_heads": {"insert": 0, "rates": 3},
            "input_features": {"offset": 4, "flag": 2},
        }
    )


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    return CONFIGS[request.param]


@pytest.fixture
def decoder(config: DecoderConfig) -> Decoder:
    return lively_decoder(config)


def lively_decoder(config: DecoderConfig, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder whose every weight matters: initial weights, enlarged, and norms away from one."""
    decoder = Decoder(config)
    initialize(decoder, seed=7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif is_extra(name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif name.startswith("blocks"):
                parameter.mul_(5.0)
    decoder.to(dtype).reset_buffers("cpu")
    return decoder.eval()


def random_tokens(*shape: int, vocab_size: int = 101, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
