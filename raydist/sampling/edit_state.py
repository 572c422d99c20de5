"""Texts of a batch that grow and shrink, and the simultaneous application of edits to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raydist.core.edit_model import CLOSED, FREE, OPEN
from raydist.core.errors import ConfigError


@dataclass(frozen=True)
class EditState:
    """One text per row: given tokens in front, free ones, given ones at the end.

    Attributes:
        tokens_BL: int64; anything behind a text's end.
        born_BL: the forward in which a token came, counted from 1; 0 for one that was there from the start.
        lengths_B: tokens of each text.
        num_first_B: given tokens in front, at least 1: the begin token is one of them.
        num_last_B: given tokens at the end.
        limits_B: the most tokens that each text may have.
    """

    tokens_BL: Tensor
    born_BL: Tensor
    lengths_B: Tensor
    num_first_B: Tensor
    num_last_B: Tensor
    limits_B: Tensor

    @classmethod
    def of(
        cls,
        first: Sequence[Sequence[int]],
        free: Sequence[Sequence[int]],
        last: Sequence[Sequence[int]],
        *,
        limit: int,
        fill: int,
        device: torch.device,
    ) -> EditState:
        """Texts from their three parts.

        Args:
            first: given tokens in front, the begin token among them.
            free: tokens that may be edited.
            last: given tokens at the end.
            limit: the most free tokens of a text.
            fill: an id for the places behind shorter texts.
            device: where the tensors live.
        """
        texts = [[*a, *b, *c] for a, b, c in zip(first, free, last, strict=True)]
        longest = max(map(len, texts))
        tokens_BL = torch.tensor([[*text, *[fill] * (longest - len(text))] for text in texts], device=device)
        num_first_B = torch.tensor([len(part) for part in first], device=device)
        num_last_B = torch.tensor([len(part) for part in last], device=device)
        return cls(
            tokens_BL=tokens_BL,
            born_BL=torch.zeros_like(tokens_BL),
            lengths_B=torch.tensor([len(text) for text in texts], device=device),
            num_first_B=num_first_B,
            num_last_B=num_last_B,
            limits_B=num_first_B + num_last_B + limit,
        )

    def free_lists(self, values_BL: Tensor) -> list[list[int]]:
        """The values at each text's free tokens."""
        ends_B = self.lengths_B - self.num_last_B
        bounds = zip(values_BL.tolist(), self.num_first_B.tolist(), ends_B.tolist(), strict=True)
        return [row[start:end] for row, start, end in bounds]

    @property
    def index_L(self) -> Tensor:
        """0 .. L - 1."""
        return torch.arange(self.tokens_BL.shape[1], device=self.tokens_BL.device)

    @property
    def free_BL(self) -> Tensor:
        """Tokens that may be deleted or substituted, bool."""
        last_free_B1 = (self.lengths_B - self.num_last_B)[:, None]
        return (self.index_L >= self.num_first_B[:, None]) & (self.index_L < last_free_B1)

    @property
    def open_BL(self) -> Tensor:
        """Tokens behind which may be inserted, bool: the free ones and the last given one before them."""
        return self.free_BL | (self.index_L == self.num_first_B[:, None] - 1)

    @property
    def context_BL(self) -> Tensor:
        """The input feature ``context``."""
        given_BL = torch.where(self.open_BL, OPEN, CLOSED)
        return torch.where(self.free_BL, FREE, given_BL)

    def without_given(self) -> EditState:
        """Only the begin token and the free tokens: what the unconditional model of guidance reads."""
        shift_B1 = (self.num_first_B - 1)[:, None]
        source_BL = (self.index_L + shift_B1).clamp(max=self.tokens_BL.shape[1] - 1)
        tokens_BL = torch.where(self.index_L == 0, self.tokens_BL, self.tokens_BL.gather(1, source_BL))
        return replace(
            self,
            tokens_BL=tokens_BL,
            born_BL=self.born_BL.gather(1, source_BL),
            lengths_B=self.lengths_B - shift_B1[:, 0] - self.num_last_B,
            num_first_B=torch.ones_like(self.num_first_B),
            num_last_B=torch.zeros_like(self.num_last_B),
        )


@dataclass(frozen=True)
class EditProposal:
    """At most one insertion behind each token, and at most one of deletion and substitution at it; all ``[B, L]``.

    Attributes:
        insert_BL: bool.
        inserted_BL: the token to insert.
        delete_BL: bool.
        substitute_BL: bool, nowhere True where ``delete_BL`` is.
        substituted_BL: the token to put in place.
    """

    insert_BL: Tensor
    inserted_BL: Tensor
    delete_BL: Tensor
    substitute_BL: Tensor
    substituted_BL: Tensor


def apply_edits(state: EditState, proposal: EditProposal, *, forward: int) -> EditState:
    """All edits at once: each old token is kept, replaced or dropped, then its insertion follows.

    A text that would pass its limit takes its insertions from the left until it is full, after its deletions; the others are
    dropped, and come again in a later step if they are still wanted and there is room.

    Args:
        state: the texts.
        proposal: edits at places that ``state.open_BL`` and ``state.free_BL`` allow.
        forward: goes to ``born_BL`` of new tokens.
    """
    real_BL = state.index_L < state.lengths_B[:, None]
    kept_BL = real_BL & ~proposal.delete_BL
    room_B1 = (state.limits_B - kept_BL.sum(dim=1))[:, None]
    inserted_BL = proposal.insert_BL & (proposal.insert_BL.cumsum(dim=1) <= room_B1)
    kept_so_far_BL, inserted_so_far_BL = kept_BL.cumsum(dim=1), inserted_BL.cumsum(dim=1)
    lengths_B = kept_so_far_BL[:, -1] + inserted_so_far_BL[:, -1]
    width = int(lengths_B.max())
    kept_to_BL = kept_so_far_BL - 1 + inserted_so_far_BL - inserted_BL.long()
    inserted_to_BL = kept_so_far_BL + inserted_so_far_BL - 1
    changed_BL = torch.where(proposal.substitute_BL, proposal.substituted_BL, state.tokens_BL)
    now = torch.full_like(state.born_BL, forward)
    return replace(
        state,
        tokens_BL=_scattered(
            (kept_BL, kept_to_BL, changed_BL), (inserted_BL, inserted_to_BL, proposal.inserted_BL), width=width
        ),
        born_BL=_scattered(
            (kept_BL, kept_to_BL, torch.where(proposal.substitute_BL, now, state.born_BL)),
            (inserted_BL, inserted_to_BL, now),
            width=width,
        ),
        lengths_B=lengths_B,
    )


def _scattered(*parts: tuple[Tensor, Tensor, Tensor], width: int) -> Tensor:
    """``[B, width]`` with the chosen values of each part at their targets; zeros elsewhere."""
    chosen_BL, _, values_BL = parts[0]
    result = values_BL.new_zeros(len(chosen_BL), width + 1)
    for chosen_BL, target_BL, values_BL in parts:
        result.scatter_(1, target_BL.masked_fill(~chosen_BL, width), values_BL)
    return result[:, :width]


def require_room(state: EditState, *, max_positions: int) -> None:
    """Refuses texts that may outgrow the model.

    Raises:
        ConfigError: the limit of a text is above the model's positions.
    """
    longest = int(state.limits_B.max())
    if longest > max_positions:
        raise ConfigError(
            "a text may become longer than the model's positions",
            where="max_new_tokens",
            found=f"{longest} tokens with what is given",
            expected=f"at most {max_positions}",
            fix="shorten the prompt or lower --max-new-tokens",
        )
