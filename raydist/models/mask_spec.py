"""The masks of training, and the door to all masks.

The base with its renderings is in :mod:`raydist.models.mask_rendering`, the masks of decoding behind a cache in
:mod:`raydist.models.cached_masks`; both are importable from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from raydist.models.cached_masks import CachedBlockMask, CachedMask, DecodingMask
from raydist.models.mask_rendering import MaskPart, MaskSpec, Piece

__all__ = [
    "BlockCausalMask",
    "BlockDiffusionMask",
    "CachedBlockMask",
    "CachedMask",
    "CausalMask",
    "DecodingMask",
    "FullMask",
    "MaskPart",
    "MaskSpec",
    "SetBlockMask",
    "document_positions",
]

_QUERIES_PER_PART = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedMask(MaskSpec):
    """The base of masks over rows of packed documents: no pair crosses a document's border.

    Attributes:
        length: tokens of a row; of its clean copy, where the model sees two copies.
        documents_BL: document of each token, ``[B, length]``; None where a row is one document.
    """

    length: int
    documents_BL: Tensor | None = None

    @property
    @override
    def num_rows(self) -> int:
        return 1 if self.documents_BL is None else self.documents_BL.shape[0]

    @override
    def to(self, device: torch.device | str) -> Self:
        documents_BL = None if self.documents_BL is None else self.documents_BL.to(device, non_blocking=True)
        return replace(self, documents_BL=documents_BL)

    def _same_document(self, row: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if self.documents_BL is None:
            return torch.ones((), dtype=torch.bool, device=i.device)
        return self.documents_BL[row, i] == self.documents_BL[row, j]


@dataclass(frozen=True, eq=False, kw_only=True)
class CausalMask(PackedMask):
    """Each token sees itself and what came before it in its document."""

    @property
    @override
    def num_queries(self) -> int:
        return self.length

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & self._same_document(row, query, key)

    @override
    def num_allowed_pairs(self) -> int:
        return self.length * (self.length + 1) // 2

    @override
    def _pieces(self) -> list[Piece]:
        return _causal_pieces(self.length, one_document=self.documents_BL is None)


@dataclass(frozen=True, eq=False, kw_only=True)
class FullMask(PackedMask):
    """Each token sees every token of its document. Padding is a document of its own."""

    @property
    @override
    def num_queries(self) -> int:
        return self.length

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self._same_document(row, query, key).expand(torch.broadcast_shapes(query.shape, key.shape, row.shape))

    @override
    def num_allowed_pairs(self) -> int:
        return self.length**2

    @override
    def _pieces(self) -> list[Piece]:
        everything = slice(0, self.length)
        return [(everything, (everything,), "all" if self.documents_BL is None else "listed")]


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockCausalMask(PackedMask):
    """Each token sees its own block, both ways, and all earlier ones: the clean half of :class:`BlockDiffusionMask`.

    Attributes:
        block_size: k.
    """

    block_size: int

    @property
    @override
    def num_queries(self) -> int:
        return self.length

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key // self.block_size <= query // self.block_size) & self._same_document(row, query, key)

    @override
    def num_allowed_pairs(self) -> int:
        return sum(_block_pairs(self.length, self.block_size))

    @override
    def _pieces(self) -> list[Piece]:
        return _block_causal_pieces(self.length, self.block_size)


@dataclass(frozen=True, eq=False, kw_only=True)
class SetBlockMask(PackedMask):
    """The doubled sequence ``[clean ; noised]`` of Set Block Decoding (arXiv 2509.04185, Algorithm 1).

    With ``c(i) = i // block_size`` and all pairs inside one document:

    - a clean query i sees the clean keys j <= i and nothing noised;
    - a noised query i sees the noised keys j with c(j) = c(i), both ways, and the clean keys j with c(j) < c(i).

    Attributes:
        block_size: k.
    """

    block_size: int

    @property
    @override
    def num_queries(self) -> int:
        return 2 * self.length

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        i, j = query % self.length, key % self.length
        seen_noised = _noised_sees(i, j, clean_key=key < self.length, block_size=self.block_size)
        seen = torch.where(query < self.length, (key < self.length) & (j <= i), seen_noised)
        return seen & self._same_document(row, i, j)

    @override
    def num_allowed_pairs(self) -> int:
        """``L(L+1)/2 + sum of squared block sizes + sum over noised tokens of clean tokens in earlier blocks``."""
        inside, earlier = _block_pairs(self.length, self.block_size)
        return self.length * (self.length + 1) // 2 + inside + earlier

    @override
    def _pieces(self) -> list[Piece]:
        clean = _causal_pieces(self.length, one_document=self.documents_BL is None)
        return [*clean, *_noised_pieces(self.length, self.block_size)]


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockDiffusionMask(PackedMask):
    """The doubled sequence ``[clean ; noised]`` of block diffusion.

    With ``c(i) = i // block_size`` and all pairs inside one document:

    - a clean query i sees the clean keys j with c(j) <= c(i) and nothing noised;
    - a noised query i sees the noised keys j with c(j) = c(i), both ways, and the clean keys j with c(j) < c(i).

    So a noised block sees what decoding behind a cache of finished blocks would show it (:class:`CachedBlockMask`).

    Attributes:
        block_size: k.
    """

    block_size: int

    @property
    @override
    def num_queries(self) -> int:
        return 2 * self.length

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        i, j = query % self.length, key % self.length
        clean_key = key < self.length
        seen_noised = _noised_sees(i, j, clean_key=clean_key, block_size=self.block_size)
        seen_clean = clean_key & (j // self.block_size <= i // self.block_size)
        return torch.where(query < self.length, seen_clean, seen_noised) & self._same_document(row, i, j)

    @override
    def num_allowed_pairs(self) -> int:
        """Twice the sum of squared block sizes and the tokens in earlier blocks: each half sees its block and those."""
        inside, earlier = _block_pairs(self.length, self.block_size)
        return 2 * (inside + earlier)

    @override
    def _pieces(self) -> list[Piece]:
        clean = _block_causal_pieces(self.length, self.block_size)
        return [*clean, *_noised_pieces(self.length, self.block_size)]


def document_positions(documents_BL: Tensor) -> Tensor:
    """Positions that restart at 0 with each document, int64 ``[B, L]``."""
    index_L = torch.arange(documents_BL.shape[1], device=documents_BL.device)
    is_start_BL = torch.ones_like(documents_BL, dtype=torch.bool)
    is_start_BL[:, 1:] = documents_BL[:, 1:] != documents_BL[:, :-1]
    start_BL = torch.where(is_start_BL, index_L, 0).cummax(dim=1).values
    return index_L - start_BL


def _noised_sees(i: Tensor, j: Tensor, *, clean_key: Tensor, block_size: int) -> Tensor:
    block_i, block_j = i // block_size, j // block_size
    return torch.where(clean_key, block_j < block_i, block_j == block_i)


def _block_pairs(length: int, block_size: int) -> tuple[int, int]:
    """Pairs of tokens of one block, and pairs of a token and one in an earlier block."""
    num_full, rest = divmod(length, block_size)
    inside = num_full * block_size * block_size + rest * rest
    return inside, block_size * (block_size * num_full * (num_full - 1) // 2 + rest * num_full)


def _causal_pieces(length: int, *, one_document: bool) -> list[Piece]:
    if one_document:
        return [(slice(0, length), (slice(0, length),), "causal")]
    return _block_causal_pieces(length, 1)


def _block_causal_pieces(length: int, block_size: int) -> list[Piece]:
    return [(span, (slice(0, span.stop),), "listed") for span in _block_spans(length, block_size)]


def _noised_pieces(length: int, block_size: int) -> list[Piece]:
    pieces: list[Piece] = []
    for span in _block_spans(length, block_size):
        noised = slice(length + span.start, length + span.stop)
        pieces.append((noised, (slice(0, span.stop), noised), "listed"))
    return pieces


def _block_spans(length: int, block_size: int) -> list[slice]:
    """The row in spans of whole blocks, near ``_QUERIES_PER_PART`` tokens each."""
    step = max(block_size, _QUERIES_PER_PART // block_size * block_size)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
