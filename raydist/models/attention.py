"""Grouped-query attention under a described mask."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from raydist.models.config import DecoderConfig
from raydist.models.mask_spec import DecodingMask, MaskPart, MaskSpec
from raydist.models.norm import RMSNorm
from raydist.models.rope import Rotation

AttentionBackend = Literal["sdpa", "flex"]


class KeyValueCache(Protocol):
    """What the layers need of a cache while decoding."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a layer's new keys and values, ``[B, G, n, h]`` each, rotated.

        Returns:
            ``[cached slots ; new]`` of both, ``[B, G, W + n, h]``: the order that a ``CachedMask`` assumes.
        """


class AttentionKernel(Protocol):
    """Attention with its mask already rendered; made once a forward and shared by all layers."""

    def __call__(self, queries_BHQh: Tensor, keys_BGKh: Tensor, values_BGKh: Tensor) -> Tensor:
        """Mixed values ``[B, Q, H, h]``; the softmax scale is ``1 / sqrt(h)``."""


class PartsKernel(AttentionKernel):
    """Scaled-dot-product attention, one rectangle of the mask at a time."""

    def __init__(self, parts: list[MaskPart]) -> None:
        self.parts = parts

    @override
    def __call__(self, queries_BHQh: Tensor, keys_BGKh: Tensor, values_BGKh: Tensor) -> Tensor:
        lengths = [part.queries.stop - part.queries.start for part in self.parts]
        outputs = [
            F.scaled_dot_product_attention(
                part_BHqh,
                _pick(keys_BGKh, part.keys),
                _pick(values_BGKh, part.keys),
                attn_mask=part.bias,
                is_causal=part.rule == "causal",
                enable_gqa=keys_BGKh.shape[1] != queries_BHQh.shape[1],
            ).transpose(1, 2)
            for part, part_BHqh in zip(self.parts, queries_BHQh.split(lengths, dim=2), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class FlexKernel(AttentionKernel):
    """FlexAttention: compiled on CUDA; on CPU eager and forward only."""

    def __init__(self, block_mask: Any) -> None:
        self.block_mask = block_mask

    @override
    def __call__(self, queries_BHQh: Tensor, keys_BGKh: Tensor, values_BGKh: Tensor) -> Tensor:
        flex = _flex_attention(queries_BHQh.device.type)
        gqa = keys_BGKh.shape[1] != queries_BHQh.shape[1]
        mixed_BHQh = flex(queries_BHQh, keys_BGKh, values_BGKh, block_mask=self.block_mask, enable_gqa=gqa)
        return mixed_BHQh.transpose(1, 2)


def attention_kernel(
    mask: MaskSpec, *, backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> AttentionKernel:
    """Renders a mask for a backend. Decoding has few queries and ever new widths, so it never uses flex."""
    if backend == "flex" and not isinstance(mask, DecodingMask):
        return FlexKernel(mask.flex_block_mask(device=device))
    return PartsKernel(mask.parts(device=device, dtype=dtype))


class Attention(nn.Module):
    """Projections, rotation, attention and output projection of one block; no biases."""

    def __init__(self, config: DecoderConfig, *, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = nn.Linear(config.width, query_width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(query_width, config.width, bias=False)
        self.query_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self, hidden_BLD: Tensor, rotation: Rotation, kernel: AttentionKernel, cache: KeyValueCache | None
    ) -> Tensor:
        """Returns what is added to the residual stream, ``[B, L, D]``."""
        queries_BLHh = self._split(self.query(hidden_BLD))
        keys_BLGh = self._split(self.key(hidden_BLD))
        values_BGLh = self._split(self.value(hidden_BLD)).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            queries_BLHh, keys_BLGh = self.query_norm(queries_BLHh), self.key_norm(keys_BLGh)
        queries_BHLh = rotation.apply(queries_BLHh.transpose(1, 2))
        keys_BGLh = rotation.apply(keys_BLGh.transpose(1, 2))
        if cache is not None:
            keys_BGLh, values_BGLh = cache.extend(self.layer, keys_BGLh, values_BGLh)
        return self.output(kernel(queries_BHLh, keys_BGLh, values_BGLh).flatten(2))

    def _split(self, projected_BLC: Tensor) -> Tensor:
        return projected_BLC.unflatten(-1, (-1, self.head_dim))


def _pick(keys_BGKh: Tensor, slices: tuple[slice, ...]) -> Tensor:
    picked = [keys_BGKh[:, :, part] for part in slices]
    return picked[0] if len(picked) == 1 else torch.cat(picked, dim=2)


@cache
def _flex_attention(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention
