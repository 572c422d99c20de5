"""The documents of packed rows as sequences of their own, each with a begin token, given tokens and noise of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.objectives.alignment import BLANK, Ragged

_DOCUMENT_BIT = 48  # row ids count the rows of a data set, far below 2**48


@dataclass(frozen=True)
class RowSequences:
    """The pieces of documents that a batch of rows holds, in row order.

    Attributes:
        tokens_T: all tokens, flat.
        sequences_T: which sequence each belongs to.
        index_T: its place in the sequence.
        given_T: tokens that the loss mask excludes.
        rows_S: the row of each sequence.
        documents_S: its number in the row.
    """

    tokens_T: Tensor
    sequences_T: Tensor
    index_T: Tensor
    given_T: Tensor
    rows_S: Tensor
    documents_S: Tensor

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.rows_S)

    def lengths(self) -> Tensor:
        """Tokens per sequence, int64 ``[S]``."""
        return torch.bincount(self.sequences_T, minlength=self.num_sequences)

    def ragged(self, values_T: Tensor, *, keep_T: Tensor) -> Ragged:
        """The kept tokens' values by sequence."""
        sequences = self.sequences_T[keep_T]
        lengths_S = torch.bincount(sequences, minlength=self.num_sequences)
        rank = torch.arange(len(sequences)) - (lengths_S.cumsum(0) - lengths_S)[sequences]
        tokens_SL = torch.full((self.num_sequences, int(lengths_S.max())), BLANK)
        tokens_SL[sequences, rank] = values_T[keep_T]
        return Ragged(tokens_SL, lengths_S)

    def rng(self, rng: RowRng) -> RowRng:
        """A noise source per sequence: the row's, with the document's number in the row id."""
        return replace(
            rng,
            epochs_B=rng.epochs_B[self.rows_S],
            rows_B=rng.rows_B[self.rows_S] | (self.documents_S << _DOCUMENT_BIT),
            samples_B=None,
        )


def row_sequences(rows: Rows, *, begin_id: int) -> RowSequences:
    """Splits rows at document boundaries; the last token of a row is left out, as for every objective.

    A begin token at the front of a document is dropped, because every sequence gets one; a document of nothing else still
    counts as a sequence.
    """
    tokens_BL, documents_BL = rows.tokens_BS[:, :-1], rows.documents_BS[:, :-1]
    starts_BL = torch.ones_like(documents_BL, dtype=torch.bool)
    starts_BL[:, 1:] = documents_BL[:, 1:] != documents_BL[:, :-1]
    rows_S, columns_S = starts_BL.nonzero(as_tuple=True)
    sequences_T = starts_BL.flatten().cumsum(0) - 1
    index_T = torch.arange(len(sequences_T)) - (rows_S * tokens_BL.shape[1] + columns_S)[sequences_T]
    tokens_T = tokens_BL.flatten()
    begins_T = (index_T == 0) & (tokens_T == begin_id)
    has_begin_S = torch.zeros(len(rows_S), dtype=torch.int64).index_add_(0, sequences_T, begins_T.long())
    given_T = torch.zeros_like(begins_T)
    if rows.loss_mask_BS is not None:
        given_T = ~rows.loss_mask_BS[:, :-1].flatten()
    return RowSequences(
        tokens_T=tokens_T[~begins_T],
        sequences_T=sequences_T[~begins_T],
        index_T=(index_T - has_begin_S[sequences_T])[~begins_T],
        given_T=given_T[~begins_T],
        rows_S=rows_S,
        documents_S=(starts_BL.cumsum(dim=1) - 1)[rows_S, columns_S],
    )
