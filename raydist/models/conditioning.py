"""What a decoder may be told besides its tokens: a time, and features of each position.

Everything here starts at zero effect, so a decoder with weights of one without computes the same numbers bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydist.core.errors import ModelError
from raydist.models.config import DecoderConfig

_TIME_SCALE = 1000.0
_LONGEST_PERIOD = 10_000.0


class TimeEmbedding(nn.Module):
    """``silu(W2 silu(W1 phi(t) + b1) + b2)`` of sinusoidal features ``phi(t)``, computed in float32.

    With ``f_j = 10000 ** (-j / (C / 2))``, ``phi(t) = [cos(1000 t f_j) ; sin(1000 t f_j)]``: the slowest feature tells
    early from late, the fastest resolves steps of a thousandth. All norms of the decoder are modulated by projections of
    the result (adaLN). The widths and the scale are our choice.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_channels = config.time_width
        self.inner = nn.Linear(config.time_width, config.time_width)
        self.outer = nn.Linear(config.time_width, config.time_width)

    def forward(self, time_BL: Tensor) -> Tensor:
        """The condition ``[B, L, C]`` of times in [0, 1]; ``[B, 1, C]`` of one time a row."""
        features_BLC = sinusoidal_features(time_BL, num_channels=self.num_channels)
        return F.silu(self.outer(F.silu(self.inner(features_BLC.to(self.inner.weight.dtype)))))


def sinusoidal_features(time_BL: Tensor, *, num_channels: int) -> Tensor:
    """``phi(t)`` of :class:`TimeEmbedding`, float32 ``[B, L, C]``."""
    index_f = torch.arange(num_channels // 2, dtype=torch.float32, device=time_BL.device)
    frequencies_f = torch.exp(-math.log(_LONGEST_PERIOD) / (num_channels // 2) * index_f)
    angles_BLf = _TIME_SCALE * time_BL.to(torch.float32)[..., None] * frequencies_f
    return torch.cat((angles_BLf.cos(), angles_BLf.sin()), dim=-1)


def modulated(normed_BLD: Tensor, scale_BLD: Tensor, shift_BLD: Tensor) -> Tensor:
    """``normed * (1 + scale) + shift``."""
    return torch.addcmul(shift_BLD, normed_BLD, 1 + scale_BLD)


def gated(hidden_BLD: Tensor, update_BLD: Tensor, gate_BLD: Tensor) -> Tensor:
    """``hidden + (1 + gate) * update``: unlike in adaLN-zero a gate of zero leaves a trained branch open."""
    return torch.addcmul(hidden_BLD, update_BLD, 1 + gate_BLD)


def require_conditions(
    config: DecoderConfig, *, tokens_BL: Tensor, time_BL: Tensor | None, features: Mapping[str, Tensor] | None
) -> None:
    """Checks that a decoder is given what it was built for, no more and no less.

    Raises:
        ModelError: a time or feature is missing or unknown, or has another shape than the tokens.
    """
    if config.time_input != (time_BL is not None):
        raise ModelError(
            "the model needs a time for its tokens" if config.time_input else "the model takes no time",
            where="time_BL",
            found=None if time_BL is None else list(time_BL.shape),
            expected="float32 [B, L] or [B, 1]" if config.time_input else "no time",
            fix="use an objective or sampler of the kind that the model was trained with",
        )
    given = {} if features is None else features
    if given.keys() != config.input_features.keys():
        raise ModelError(
            "the model's input features are not those that were given",
            where="features",
            found=", ".join(sorted(given)) or "none",
            expected=", ".join(sorted(config.input_features)) or "none",
            fix="use an objective or sampler of the kind that the model was trained with",
        )
    batch, length = tokens_BL.shape
    for name, feature in given.items():
        _require_shape(name, feature, ((batch, length),))
    if time_BL is not None:
        _require_shape("time_BL", time_BL, ((batch, length), (batch, 1)))


def _require_shape(name: str, value: Tensor, allowed: tuple[tuple[int, int], ...]) -> None:
    if tuple(value.shape) not in allowed:
        expected = " or ".join(str(list(shape)) for shape in allowed)
        raise ModelError(
            "an input has another shape than the tokens", where=name, found=list(value.shape), expected=expected
        )
