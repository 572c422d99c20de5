"""Sequences of different lengths side by side in rows of one width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each token of each sequence lies.

    Attributes:
        flat_SL: index into rows flattened to ``[R * width]``, int64 ``[S, L]``; meaningless behind a sequence's end.
        valid_SL: bool, True for the tokens of a sequence.
        documents_S: number of the sequence in its row, from 0.
        num_rows: R.
        width: tokens of a row.
    """

    flat_SL: Tensor
    valid_SL: Tensor
    documents_S: Tensor
    num_rows: int
    width: int

    def place(self, values_SL: Tensor, *, fill: float) -> Tensor:
        """The values in their places, ``[R, width]``; ``fill`` elsewhere."""
        placed = values_SL.new_full((self.num_rows * self.width,), fill)
        placed[self.flat_SL[self.valid_SL]] = values_SL[self.valid_SL]
        return placed.unflatten(0, (self.num_rows, self.width))


def pack(lengths_S: Tensor, *, width: int) -> Packing:
    """First fit, longest first: a sequence goes into the first row that has room.

    The number of rows depends on the lengths, so a compiled model meets batches of several sizes.

    Args:
        lengths_S: at most ``width`` each.
        width: tokens of a row.
    """
    lengths = lengths_S.tolist()
    rows, offsets, documents = [0] * len(lengths), [0] * len(lengths), [0] * len(lengths)
    filled: list[int] = []
    sizes: list[int] = []
    for sequence in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        row = next((r for r, used in enumerate(filled) if used + lengths[sequence] <= width), len(filled))
        if row == len(filled):
            filled.append(0)
            sizes.append(0)
        rows[sequence], offsets[sequence], documents[sequence] = row, filled[row], sizes[row]
        filled[row] += lengths[sequence]
        sizes[row] += 1
    index_L = torch.arange(max(lengths, default=0))
    first_S = torch.tensor(rows) * width + torch.tensor(offsets)
    return Packing(
        flat_SL=first_S[:, None] + index_L,
        valid_SL=index_L < lengths_S[:, None],
        documents_S=torch.tensor(documents),
        num_rows=len(filled),
        width=width,
    )
