"""What the model sees of an aligned pair at some time, and which edits are still missing.

Source: Havasi et al. 2025, "Edit Flows: Flow Matching with Edit Operations", arXiv 2506.09018, Theorem 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raydist.core.edit_model import CLOSED, DELETE_TOKEN, FREE, INSERT_RIGHT, NUM_OPERATIONS, OPEN, SUBSTITUTE_TOKEN
from raydist.objectives.alignment import BLANK, Aligned

NO_EDIT = -1


@dataclass(frozen=True)
class Example:
    """Aligned pairs with their given columns. A given column holds the same token on both sides and is never edited.

    Attributes:
        aligned: x0 and x1, column 0 is the begin token.
        given_SN: bool ``[S, N]``.
    """

    aligned: Aligned
    given_SN: Tensor


@dataclass(frozen=True)
class Edits:
    """The edits that lead from a noised sequence to another one, one at most per column; all ``[S, N]``.

    Attributes:
        operation_SN: one of the operations, or ``NO_EDIT``.
        position_SN: index in the noised sequence where the edit applies: that of the column's own token, or for an
            insertion that of the last token before it.
        tokens_SN: what is inserted or substituted.
    """

    operation_SN: Tensor
    position_SN: Tensor
    tokens_SN: Tensor

    def counts(self, weights_SN: Tensor, *, length: int) -> Tensor:
        """The weighted number of edits per position and operation, float32 ``[S, length, 3]``."""
        wanted_SN = self.operation_SN != NO_EDIT
        flat_SN = (self.position_SN * NUM_OPERATIONS + self.operation_SN).masked_fill(~wanted_SN, 0)
        counts = torch.zeros(len(flat_SN), length * NUM_OPERATIONS)
        counts.scatter_add_(1, flat_SN, weights_SN.masked_fill(~wanted_SN, 0.0).to(counts.dtype))
        return counts.unflatten(1, (length, NUM_OPERATIONS))


def splice_given(free: Aligned, *, given_SG: Tensor, free_before_SG: Tensor, begin_id: int) -> Example:
    """Puts the begin token and given tokens between the columns of the free ones.

    A given token stands behind the column of the last free data token before it and behind any deletions there; given
    tokens before all free ones come first.

    Args:
        free: alignment of the tokens that are not given.
        given_SG: given tokens in their order, ``BLANK`` behind the last.
        free_before_SG: how many free data tokens come before each.
        begin_id: the token in front of everything.
    """
    num_sequences = len(given_SG)
    begin_S1 = torch.full((num_sequences, 1), begin_id)
    used_SN = (free.start_SN != BLANK) | (free.data_SN != BLANK)
    last = 2 * free.data_SN.shape[1] + 2
    free_key_SN = (2 * (free.data_SN != BLANK).cumsum(dim=1)).masked_fill(~used_SN, last)
    given_key_SG = torch.where(free_before_SG == 0, -1, 2 * free_before_SG + 1).masked_fill(given_SG == BLANK, last)
    key_SN = torch.cat([torch.full_like(begin_S1, -2), given_key_SG, free_key_SN], dim=1)
    order_SN = key_SN.argsort(dim=1, stable=True)
    start_SN = torch.cat([begin_S1, given_SG, free.start_SN], dim=1).gather(1, order_SN)
    data_SN = torch.cat([begin_S1, given_SG, free.data_SN], dim=1).gather(1, order_SN)
    is_given_SN = torch.cat([begin_S1 == begin_id, given_SG != BLANK, torch.zeros_like(used_SN)], dim=1)
    return Example(Aligned(start_SN, data_SN), is_given_SN.gather(1, order_SN))


@dataclass(frozen=True)
class Noised:
    """Aligned pairs at some time; all ``[S, N]``.

    Attributes:
        aligned: x0 and x1.
        noised_SN: ``z_t``.
        given_SN: columns that are never edited.
    """

    aligned: Aligned
    noised_SN: Tensor
    given_SN: Tensor


def noise(example: Example, *, flipped_SN: Tensor, max_length: int) -> Noised:
    """``z_t``: x1's symbol where a column is flipped, x0's elsewhere.

    A sequence with more than ``max_length`` tokens loses the columns from its next token on, on both sides, as if the text
    ended there.
    """
    start_SN, data_SN = example.aligned.start_SN, example.aligned.data_SN
    noised_SN = torch.where(flipped_SN, data_SN, start_SN)
    cut_SN = positions_of(noised_SN) >= max_length
    aligned = Aligned(start_SN.masked_fill(cut_SN, BLANK), data_SN.masked_fill(cut_SN, BLANK))
    return Noised(aligned, noised_SN.masked_fill(cut_SN, BLANK), example.given_SN)


def positions_of(noised_SN: Tensor) -> Tensor:
    """Index of the last token at or before each column; column 0 is the begin token, so it is at least 0."""
    return (noised_SN != BLANK).cumsum(dim=1) - 1


def compact(columns_SN: Tensor, *, noised_SN: Tensor, fill: int) -> Tensor:
    """The values of the columns that hold a token of ``noised_SN``, moved to the left: ``rm``; ``[S, longest]``."""
    present_SN = noised_SN != BLANK
    longest = int(present_SN.sum(dim=1).max()) if len(noised_SN) else 0
    target_SN = torch.where(present_SN, positions_of(noised_SN), longest)
    moved = columns_SN.new_full((len(columns_SN), longest + 1), fill)
    return moved.scatter_(1, target_SN, columns_SN)[:, :longest]


def edits_to(goal_SN: Tensor, *, noised_SN: Tensor) -> Edits:
    """The edits from ``z_t`` to an aligned sequence: x1 for the forward rates, x0 for the reverse ones."""
    operation_SN = torch.full_like(noised_SN, SUBSTITUTE_TOKEN)
    operation_SN[goal_SN == BLANK] = DELETE_TOKEN
    operation_SN[noised_SN == BLANK] = INSERT_RIGHT
    operation_SN[goal_SN == noised_SN] = NO_EDIT
    return Edits(operation_SN, positions_of(noised_SN), goal_SN)


def context_feature(noised: Noised) -> Tensor:
    """``FREE``, ``CLOSED`` or ``OPEN`` of each column: a given token is closed where the next column is given too, and at
    the end of its sequence.
    """
    stays_SN = noised.given_SN | ((noised.aligned.start_SN == BLANK) & (noised.aligned.data_SN == BLANK))
    following_SN = torch.ones_like(stays_SN)
    following_SN[:, :-1] = stays_SN[:, 1:]
    return torch.where(noised.given_SN, torch.where(following_SN, CLOSED, OPEN), FREE)
