"""Who may attend to whom while decoding: new tokens behind a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from raydist.models.mask_rendering import MaskSpec


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodingMask(MaskSpec):
    """The base of masks with cached keys: ``[cache_width cached slots ; new tokens]``.

    Every new token sees the filled slots of its row.

    Attributes:
        cache_lengths_B: filled slots of each row, ``[B]``; slots at and beyond it are not seen.
        cache_width: slots that the cache hands out, W.
    """

    cache_lengths_B: Tensor
    cache_width: int

    @property
    @override
    def num_rows(self) -> int:
        return self.cache_lengths_B.shape[0]

    @property
    @override
    def num_keys(self) -> int:
        return self.cache_width + self.num_queries

    @override
    def to(self, device: torch.device | str) -> Self:
        return replace(self, cache_lengths_B=self.cache_lengths_B.to(device))

    def _is_filled(self, row: Tensor, key: Tensor) -> Tensor:
        return (key < self.cache_width) & (key < self.cache_lengths_B[row])


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedMask(DecodingMask):
    """First causal tokens, then one bidirectional block.

    A causal token sees the filled slots of its row and the causal tokens up to itself. A block token sees the filled
    slots, all causal tokens and all of the block.

    Attributes:
        num_causal: c, the first new tokens.
        num_block: the new tokens after them.
    """

    num_causal: int
    num_block: int = 0

    @property
    @override
    def num_queries(self) -> int:
        return self.num_causal + self.num_block

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        new = (key >= self.cache_width) & ((query >= self.num_causal) | (key - self.cache_width <= query))
        return self._is_filled(row, key) | new

    @override
    def num_allowed_pairs(self) -> int:
        """Of a row whose cache is full."""
        new_pairs = self.num_causal * (self.num_causal + 1) // 2 + self.num_block * self.num_queries
        return self.num_queries * self.cache_width + new_pairs


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedBlockMask(DecodingMask):
    """First a finished block, then the current one: decoding with the attention of :class:`BlockDiffusionMask`.

    A token of the finished block sees the filled slots of its row and all of the finished block: its keys and values are
    what the cache keeps. A token of the current block sees the filled slots, the finished block and all of its own.

    Attributes:
        num_finished: tokens of the finished block; 0 after its keys and values are in the cache.
        num_current: tokens of the current block.
    """

    num_finished: int
    num_current: int

    @property
    @override
    def num_queries(self) -> int:
        return self.num_finished + self.num_current

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_finished_key = key - self.cache_width < self.num_finished
        new = (key >= self.cache_width) & ((query >= self.num_finished) | is_finished_key)
        return self._is_filled(row, key) | new

    @override
    def num_allowed_pairs(self) -> int:
        """Of a row whose cache is full."""
        return self.num_queries * self.cache_width + self.num_finished**2 + self.num_current * self.num_queries
