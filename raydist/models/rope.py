"""Rotary position embedding in the half-split layout of Hugging Face weights: channel i turns with channel i + h/2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydist.models.config import DecoderConfig, RopeScaling


def rope_frequencies(config: DecoderConfig, *, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position, ``theta ** (-2 i / h)``, scaled where the config says so; float32 ``[h/2]``."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else scale_frequencies(frequencies, scaling=config.rope_scaling)


def scale_frequencies(frequencies: Tensor, *, scaling: RopeScaling) -> Tensor:
    """The Llama-3.1 rule: fast frequencies stay, slow ones are divided by ``factor``, those between are blended.

    With N the original context and wavelength ``2 pi / w``: unchanged below ``N / high``, divided above ``N / low``,
    else ``(1 - s) w / factor + s w`` with ``s = (N / wavelength - low) / (high - low)``. (Llama 3 reference code.)
    """
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_positions / wavelengths - low) / (high - low)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


@dataclass(frozen=True)
class Rotation:
    """The rotation of each token's heads, made once a forward and shared by all layers.

    Attributes:
        cos_B1Lh: cosine of each channel's angle, float32.
        sin_B1Lf: sine of each pair's angle, float32, ``f = h / 2``.
    """

    cos_B1Lh: Tensor
    sin_B1Lf: Tensor

    @classmethod
    def at(cls, positions_BL: Tensor, *, frequencies: Tensor) -> Rotation:
        """The rotation by ``position * frequency``."""
        angles_B1Lf = positions_BL[:, None, :, None].to(torch.float32) * frequencies
        return cls(angles_B1Lf.cos().repeat(1, 1, 1, 2), angles_B1Lf.sin())

    def apply(self, x_BHLh: Tensor) -> Tensor:
        """Rotates queries or keys, in float32; returns their own dtype."""
        rotated: Tensor = _Rotate.apply(x_BHLh, self.cos_B1Lh, self.sin_B1Lf)
        return rotated


class _Rotate(torch.autograd.Function):
    """A rotation; its gradient is the upstream gradient turned back."""

    @staticmethod
    def forward(ctx: Any, x_BHLh: Tensor, cos_B1Lh: Tensor, sin_B1Lf: Tensor) -> Tensor:
        ctx.save_for_backward(cos_B1Lh, sin_B1Lf)
        return _rotated(x_BHLh, cos_B1Lh, sin_B1Lf, sign=1)

    @staticmethod
    def backward(ctx: Any, grad_BHLh: Tensor) -> tuple[Tensor, None, None]:
        cos_B1Lh, sin_B1Lf = ctx.saved_tensors
        return _rotated(grad_BHLh, cos_B1Lh, sin_B1Lf, sign=-1), None, None


def _rotated(x_BHLh: Tensor, cos_B1Lh: Tensor, sin_B1Lf: Tensor, *, sign: int) -> Tensor:
    low_BHLf, high_BHLf = x_BHLh.chunk(2, dim=-1)
    turned_BHLh = x_BHLh * cos_B1Lh
    turned_low_BHLf, turned_high_BHLf = turned_BHLh.chunk(2, dim=-1)
    turned_low_BHLf.addcmul_(high_BHLf, sin_B1Lf, value=-sign)
    turned_high_BHLf.addcmul_(low_BHLf, sin_B1Lf, value=sign)
    return turned_BHLh.to(x_BHLh.dtype)
