"""Alignments: which token of x0 becomes which token of x1, for a batch of pairs of sequences.

An alignment is a row of columns. A pair column holds a token of each side (a substitution, or nothing to do where they are
equal), a delete column one of x0 alone, an insert column one of x1 alone; dropping the blanks of either side gives the
sequence back. Every alignment is valid for training; what differs is how many edits it asks for.

Source: Havasi et al. 2025, "Edit Flows: Flow Matching with Edit Operations", arXiv 2506.09018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raydist.objectives.levenshtein import DELETE, INSERT, NOTHING, PAIR, optimal_columns

BLANK = -1
"""The blank symbol; the model never sees it."""

AlignmentKind = Literal["optimal", "random", "padded", "shuffled", "replace"]


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths.

    Attributes:
        tokens_SL: int64, ``BLANK`` behind the end of each sequence.
        lengths_S: int64.
    """

    tokens_SL: Tensor
    lengths_S: Tensor


@dataclass(frozen=True)
class Aligned:
    """Two sequences side by side, blanks where one has no token; ``[S, N]`` int64, blank in both behind the end."""

    start_SN: Tensor
    data_SN: Tensor


def align(start: Ragged, data: Ragged, *, kind: AlignmentKind, uniforms_SN: Tensor) -> Aligned:
    """Aligns x0 with x1.

    - ``optimal``: as few edits as possible (Levenshtein).
    - ``random``: delete columns and insert columns in a random order, every order equally likely; no pairs.
    - ``padded``: index by index; what one side has more is deleted or inserted at the end.
    - ``shuffled``: half of x0 is paired with tokens of x1 and the other half deleted, the rest of x1 inserted, columns in
      random order: the noisy start of the paper (50 of 100 tokens substituted, 50 deleted).
    - ``replace``: delete everything, then insert everything.

    Args:
        start: x0.
        data: x1.
        kind: see above.
        uniforms_SN: the order of the columns of ``random`` and ``shuffled``; at least as wide as both sides together.
    """
    if kind == "optimal" and start.tokens_SL.shape[1] > 0:  # of an empty x0 all columns are insertions
        columns_SN = torch.from_numpy(
            optimal_columns(
                start.tokens_SL.numpy(),
                data.tokens_SL.numpy(),
                first_lengths_S=start.lengths_S.numpy(),
                second_lengths_S=data.lengths_S.numpy(),
            )
        )
    else:
        columns_SN = _counted_columns(start.lengths_S, data.lengths_S, kind=kind)
        if kind in ("random", "shuffled"):
            keys_SN = uniforms_SN[:, : columns_SN.shape[1]].masked_fill(columns_SN == NOTHING, torch.inf)
            columns_SN = columns_SN.gather(1, keys_SN.argsort(dim=1, stable=True))
    return columns_to_sequences(columns_SN, start=start, data=data)


def columns_to_sequences(columns_SN: Tensor, *, start: Ragged, data: Ragged) -> Aligned:
    """Lays both sequences out along columns."""
    return Aligned(
        start_SN=_lay_out(start.tokens_SL, (columns_SN == PAIR) | (columns_SN == DELETE)),
        data_SN=_lay_out(data.tokens_SL, (columns_SN == PAIR) | (columns_SN == INSERT)),
    )


def _counted_columns(start_lengths_S: Tensor, data_lengths_S: Tensor, *, kind: AlignmentKind) -> Tensor:
    """As many pair, delete and insert columns as the kind asks for, in this order; padded with ``NOTHING``."""
    shorter_S = torch.minimum(start_lengths_S, data_lengths_S)
    if kind == "padded":
        pairs_S = shorter_S
    elif kind == "shuffled":
        pairs_S = torch.minimum(start_lengths_S // 2, data_lengths_S)
    else:
        pairs_S = torch.zeros_like(shorter_S)
    ends_S3 = torch.stack([pairs_S, start_lengths_S, start_lengths_S + data_lengths_S - pairs_S], dim=1)
    index_N = torch.arange(int(ends_S3[:, 2].max()) if len(ends_S3) else 0)
    return (index_N[None, :, None] >= ends_S3[:, None, :]).sum(dim=-1)


def _lay_out(tokens_SL: Tensor, takes_SN: Tensor) -> Tensor:
    """The next token of each row where ``takes`` is True, blank elsewhere."""
    if tokens_SL.shape[1] == 0:
        return torch.full(takes_SN.shape, BLANK)
    source_SN = (takes_SN.cumsum(dim=1) - 1).clamp(min=0)
    return tokens_SL.gather(1, source_SN).masked_fill(~takes_SN, BLANK)
