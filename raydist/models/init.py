"""Random weights as a pure function of (parameter name, seed).

Each parameter has its own generator, so any process can make any parameter, whole, in any order: sharded and plain
construction agree bit for bit.

The law is torchtitan's. Llama: query, key, value and gate have standard deviation 0.02; output, up and down
``0.02 / sqrt(2 (layer + 1))``; the embedding 1; the head ``D ** -0.5``, so that logits start near zero and the loss
near ``ln V``; all of Llama's but the embedding are cut at three standard deviations. Qwen-3: 0.02 everywhere. Norms
are 1.

A tied table has 0.02 in both families. The residual stream is at first mostly the token's own embedding, so with the
head's law a token would predict itself with a logit of ``sqrt(D)``.

What a plain decoder lacks starts without effect: feature tables, modulations, narrow heads and biases at 0; a
vocabulary-sized extra head equal to the language model's own. The network of the time has ``C ** -0.5``, so that the
condition is of order one.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder

_DEPTH_SCALED = ("attention.output.weight", "feed_forward.up.weight", "feed_forward.down.weight")
_CUT_STDS = 3.0


def initial_value(name: str, shape: tuple[int, ...] | torch.Size, *, config: DecoderConfig, seed: int) -> Tensor:
    """The initial value of one parameter, float32 on CPU.

    Args:
        name: the parameter's name in :class:`~raydist.models.decoder.Decoder`.
        shape: its full shape.
        config: names the family, the width and whether the head is tied.
        seed: of the run's weights.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if is_vocabulary_head(name, config):
        name = lm_head_name(config)
    if _starts_at_zero(name):
        return torch.zeros(shape)
    std, cut = _law(name, config)
    digest = hashlib.blake2b(f"{seed}\x00{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    value = torch.empty(shape)
    if cut:
        return nn.init.trunc_normal_(value, std=std, a=-_CUT_STDS * std, b=_CUT_STDS * std, generator=generator)
    return nn.init.normal_(value, std=std, generator=generator)


def initialize(decoder: Decoder, seed: int) -> None:
    """Fills a decoder that is not on the meta device."""
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config=decoder.config, seed=seed))


def is_vocabulary_head(name: str, config: DecoderConfig) -> bool:
    """Whether a parameter is an extra head whose outputs are the vocabulary."""
    return name.startswith("extra_heads.") and config.extra_heads[name.split(".")[1]] == 0


def lm_head_name(config: DecoderConfig) -> str:
    """The parameter that is the language model's head."""
    return "embedding.weight" if config.tied_embeddings else "head.weight"


def _starts_at_zero(name: str) -> bool:
    """Whether a parameter is new to a plain decoder and must not change what it computes."""
    return name.startswith(("input_features.", "extra_heads.")) or "modulation" in name or name.endswith(".bias")


def _law(name: str, config: DecoderConfig) -> tuple[float, bool]:
    """``(standard deviation, whether the tails are cut)`` of a matrix."""
    if name.startswith("time_embedding."):
        return config.time_width**-0.5, True
    if config.family == "qwen3" or (name == "embedding.weight" and config.tied_embeddings):
        return 0.02, False
    if name == "embedding.weight":
        return 1.0, False
    if name == "head.weight":
        return config.width**-0.5, True
    if name.endswith(_DEPTH_SCALED):
        layer = int(name.split(".")[1])
        return 0.02 / math.sqrt(2 * (layer + 1)), True
    return 0.02, True
