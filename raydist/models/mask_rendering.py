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
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PartRule = Literal["causal", "all", "listed"]
Piece = tuple[slice, tuple[slice, ...], PartRule]


@dataclass(frozen=True)
class MaskPart:
    """A rectangle of the mask: consecutive queries and the only keys that any of them may see.

    Attributes:
        queries: which queries.
        keys: which keys, as slices that are joined in this order.
        rule: ``"causal"``: plain causal over the same positions; ``"all"``: every query sees every key; ``"listed"``: see
            ``bias``. The first two have kernels that read no mask.
        bias: what is added to the scores of a listed part, 0 or -inf, ``[B or 1, 1, num_queries, num_keys]``; else None.
    """

    queries: slice
    keys: tuple[slice, ...]
    rule: PartRule
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

    def _pieces(self) -> list[Piece]:
        """Queries, keys and rule of each part; covers all queries in order and every allowed pair."""
        return [(slice(0, self.num_queries), (slice(0, self.num_keys),), "listed")]

    def dense(self, *, device: torch.device | str = "cpu") -> Tensor:
        """The whole mask, bool ``[num_rows, 1, num_queries, num_keys]``."""
        return self._rectangle(slice(0, self.num_queries), (slice(0, self.num_keys),), torch.device(device))

    def parts(self, *, device: torch.device, dtype: torch.dtype) -> list[MaskPart]:
        """The mask as rectangles that leave out most of what is forbidden; rendered once per device and dtype."""
        return self._once(
            ("parts", device, dtype),
            lambda: [
                MaskPart(queries, keys, rule, self._bias(queries, keys, device, dtype) if rule == "listed" else None)
                for queries, keys, rule in self._pieces()
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
