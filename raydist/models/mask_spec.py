"""Who may attend to whom, as a description.

A :class:`MaskSpec` is a few numbers and the document ids of the rows; its one law is :meth:`MaskSpec.allowed`,
elementwise on indices. Everything else renders that law: a dense boolean tensor (the reference), a FlexAttention block
mask (CUDA), rectangular parts for scaled-dot-product attention (CPU), and a count of pairs (the planner). A spec is
built once a batch; all layers share what was rendered from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_QUERIES_PER_PART = 64


@dataclass(frozen=True)
class MaskPart:
    """A rectangle of the mask: consecutive queries and the only keys that any of them may see.

    Attributes:
        queries: which queries.
        keys: which keys, as slices that are joined in this order.
        bias: what is added to the scores, 0 or -inf, ``[B or 1, 1, num_queries, num_keys]``; None where the part is
        plain
            causal over the same positions.
    """

    queries: slice
    keys: tuple[slice, ...]
    bias: Tensor | None


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskSpec(ABC):
    """The base of all masks."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows that differ: the batch size, or 1 where all rows have the same mask."""

    @property
    @abstractmethod
    def num_queries(self) -> int:
        """Tokens that go through the model."""

    @property
    def num_keys(self) -> int:
        """Keys that the queries meet: the tokens themselves, and cached ones before them."""
        return self.num_queries

    @abstractmethod
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The law: whether ``query`` of ``row`` may see ``key``; index tensors that broadcast, bool out."""

    @abstractmethod
    def num_allowed_pairs(self) -> int:
        """Allowed (query, key) pairs of one row, in closed form, as if the row were one document."""

    @abstractmethod
    def to(self, device: torch.device | str) -> MaskSpec:
        """The spec with its tensors on a device."""

    def _pieces(self) -> list[tuple[slice, tuple[slice, ...], bool]]:
        """``(queries, keys, plain causal)`` of each part; covers all queries in order and every allowed pair."""
        return [(slice(0, self.num_queries), (slice(0, self.num_keys),), False)]

    def dense(self, *, device: torch.device | str = "cpu") -> Tensor:
        """The whole mask, bool ``[num_rows, 1, num_queries, num_keys]``."""
        return self._rectangle(slice(0, self.num_queries), (slice(0, self.num_keys),), torch.device(device))

    def parts(self, *, device: torch.device, dtype: torch.dtype) -> list[MaskPart]:
        """The mask as rectangles that leave out most of what is forbidden; rendered once per device and dtype."""
        return self._once(
            ("parts", device, dtype),
            lambda: [
                MaskPart(queries, keys, None if causal else self._bias(queries, keys, device, dtype))
                for queries, keys, causal in self._pieces()
            ],
        )

    def flex_block_mask(self, *, device: torch.device | str) -> BlockMask:
        """The FlexAttention rendering, once per device; compiled on CUDA, where no ``L x L`` tensor may appear."""
        target = torch.device(device)

        def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.allowed(row, query, key)

        def build() -> BlockMask:
            builder = _block_mask_builder(target.type)
            rows, queries, keys = self.num_rows, self.num_queries, self.num_keys
            return builder(mask_mod, B=rows, H=None, Q_LEN=queries, KV_LEN=keys, device=target.type)

        return self._once(("flex", target), build)

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        rendered = vars(self).setdefault("_rendered", {})
        if key not in rendered:
            rendered[key] = make()
        return rendered[key]

    def _rectangle(self, queries: slice, keys: tuple[slice, ...], device: torch.device) -> Tensor:
        row_B11 = torch.arange(self.num_rows, device=device)[:, None, None]
        query_1Q1 = torch.arange(queries.start, queries.stop, device=device)[None, :, None]
        key_11K = torch.cat([torch.arange(part.start, part.stop, device=device) for part in keys])[None, None, :]
        return self.allowed(row_B11, query_1Q1, key_11K).expand(self.num_rows, -1, -1)[:, None]

    def _bias(self, queries: slice, keys: tuple[slice, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        allowed_B1QK = self._rectangle(queries, keys, device)
        return torch.zeros((), dtype=dtype, device=device).where(allowed_B1QK, float("-inf"))


@cache
def _block_mask_builder(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if device_type == "cuda" else create_block_mask


@dataclass(frozen=True, eq=False, kw_only=True)
class CausalMask(MaskSpec):
    """Each token sees itself and what came before it in its document.

    Attributes:
        length: tokens of a row.
        documents_BL: which document a token belongs to, ``[B, length]``, counting up; None where a row is one document.
    """

    length: int
    documents_BL: Tensor | None = None

    @property
    @override
    def num_rows(self) -> int:
        return 1 if self.documents_BL is None else self.documents_BL.shape[0]

    @property
    @override
    def num_queries(self) -> int:
        return self.length

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & _same_document(self.documents_BL, row, query, key)

    @override
    def num_allowed_pairs(self) -> int:
        return self.length * (self.length + 1) // 2

    @override
    def to(self, device: torch.device | str) -> CausalMask:
        return CausalMask(length=self.length, documents_BL=_moved(self.documents_BL, device))

    @override
    def _pieces(self) -> list[tuple[slice, tuple[slice, ...], bool]]:
        return _causal_pieces(self.length, one_document=self.documents_BL is None)


@dataclass(frozen=True, eq=False, kw_only=True)
class SetBlockMask(MaskSpec):
    """The doubled sequence ``[clean ; noised]`` of Set Block Decoding (arXiv 2509.04185, Algorithm 1).

    With ``c(i) = i // block_size`` and all pairs inside one document:

    - a clean query i sees the clean keys j <= i and nothing noised;
    - a noised query i sees the noised keys j with c(j) = c(i), both ways, and the clean keys j with c(j) < c(i).

    Attributes:
        length: tokens of the clean copy; the model sees ``2 * length``.
        block_size: k.
        documents_BL: document of each token of the clean copy, ``[B, length]``; None where a row is one document.
    """

    length: int
    block_size: int
    documents_BL: Tensor | None = None

    @property
    @override
    def num_rows(self) -> int:
        return 1 if self.documents_BL is None else self.documents_BL.shape[0]

    @property
    @override
    def num_queries(self) -> int:
        return 2 * self.length

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        clean_query, clean_key = query < self.length, key < self.length
        i, j = query % self.length, key % self.length
        block_i, block_j = i // self.block_size, j // self.block_size
        seen_noised = torch.where(clean_key, block_j < block_i, block_j == block_i)
        seen = torch.where(clean_query, clean_key & (j <= i), seen_noised)
        return seen & _same_document(self.documents_BL, row, i, j)

    def num_allowed_pairs(self) -> int:
        """``L(L+1)/2 + sum of squared block sizes + sum over noised tokens of clean tokens in earlier blocks``."""
        k = self.block_size
        num_full, rest = divmod(self.length, k)
        inside = num_full * k * k + rest * rest
        earlier = k * (k * num_full * (num_full - 1) // 2 + rest * num_full)
        return self.length * (self.length + 1) // 2 + inside + earlier

    @override
    def to(self, device: torch.device | str) -> SetBlockMask:
        return SetBlockMask(
            length=self.length, block_size=self.block_size, documents_BL=_moved(self.documents_BL, device)
        )

    @override
    def _pieces(self) -> list[tuple[slice, tuple[slice, ...], bool]]:
        step = max(self.block_size, _QUERIES_PER_PART // self.block_size * self.block_size)
        pieces = _causal_pieces(self.length, one_document=self.documents_BL is None)
        for start in range(0, self.length, step):
            stop = min(start + step, self.length)
            noised = slice(self.length + start, self.length + stop)
            pieces.append((noised, (slice(0, stop), noised), False))
        return pieces


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedMask(MaskSpec):
    """New tokens behind a key-value cache: first causal ones, then one bidirectional block.

    The keys are ``[cache_width cached slots ; num_causal + num_block new tokens]``. A causal token sees the filled
    slots of its row and the causal tokens up to itself. A block token sees the filled slots, all causal tokens and all
    of the block.

    Attributes:
        cache_lengths_B: filled slots of each row, ``[B]``; slots at and beyond it are not seen.
        cache_width: slots that the cache hands out, W.
        num_causal: c, the first new tokens.
        num_block: the new tokens after them.
    """

    cache_lengths_B: Tensor
    cache_width: int
    num_causal: int
    num_block: int = 0

    @property
    @override
    def num_rows(self) -> int:
        return self.cache_lengths_B.shape[0]

    @property
    @override
    def num_queries(self) -> int:
        return self.num_causal + self.num_block

    @property
    @override
    def num_keys(self) -> int:
        return self.cache_width + self.num_queries

    @override
    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        cached = (key < self.cache_width) & (key < self.cache_lengths_B[row])
        new = (key >= self.cache_width) & ((query >= self.num_causal) | (key - self.cache_width <= query))
        return cached | new

    def num_allowed_pairs(self) -> int:
        """Of a row whose cache is full."""
        new_pairs = self.num_causal * (self.num_causal + 1) // 2 + self.num_block * self.num_queries
        return self.num_queries * self.cache_width + new_pairs

    @override
    def to(self, device: torch.device | str) -> CachedMask:
        return CachedMask(
            cache_lengths_B=self.cache_lengths_B.to(device),
            cache_width=self.cache_width,
            num_causal=self.num_causal,
            num_block=self.num_block,
        )


def document_positions(documents_BL: Tensor) -> Tensor:
    """Positions that restart at 0 with each document, int64 ``[B, L]``."""
    index_L = torch.arange(documents_BL.shape[1], device=documents_BL.device)
    is_start_BL = torch.ones_like(documents_BL, dtype=torch.bool)
    is_start_BL[:, 1:] = documents_BL[:, 1:] != documents_BL[:, :-1]
    start_BL = torch.where(is_start_BL, index_L, 0).cummax(dim=1).values
    return index_L - start_BL


def _causal_pieces(length: int, *, one_document: bool) -> list[tuple[slice, tuple[slice, ...], bool]]:
    if one_document:
        return [(slice(0, length), (slice(0, length),), True)]
    starts = range(0, length, _QUERIES_PER_PART)
    stops = [min(start + _QUERIES_PER_PART, length) for start in starts]
    return [(slice(start, stop), (slice(0, stop),), False) for start, stop in zip(starts, stops, strict=True)]


def _same_document(documents_BL: Tensor | None, row: Tensor, i: Tensor, j: Tensor) -> Tensor:
    if documents_BL is None:
        return torch.ones((), dtype=torch.bool, device=i.device)
    return documents_BL[row, i] == documents_BL[row, j]


def _moved(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)
