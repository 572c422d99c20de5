"""Next-token prediction: the ordinary causal language-model loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from raydist.config.registries import OBJECTIVES
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.terms import CrossEntropyTerm, HeadTerm
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import CausalMask, document_positions
from raydist.objectives.base import NoisedBatch, Objective, ObjectiveConfig


def next_token_targets(rows: Rows) -> Tensor:
    """Which positions predict their successor, bool ``[B, L]`` with ``L = S - 1``.

    Position i is False where token i + 1 begins another document, because nothing in the row announces it, and where
    the loss mask excludes token i + 1.
    """
    valid_BL = rows.documents_BS[:, 1:] == rows.documents_BS[:, :-1]
    if rows.loss_mask_BS is not None:
        valid_BL = valid_BL & rows.loss_mask_BS[:, 1:]
    return valid_BL


def flat_positions(valid_BL: Tensor, *, row_stride: int, offset: int = 0) -> Tensor:
    """Indices into hidden states flattened to ``[B * row_stride, D]`` of the True entries, int64 ``[T]``, in row order.

    Args:
        valid_BL: bool ``[B, L]``.
        row_stride: positions per row of the model's input.
        offset: where column 0 of ``valid_BL`` lies in the row.
    """
    rows_T, columns_T = valid_BL.nonzero(as_tuple=True)
    return rows_T * row_stride + columns_T + offset


def packed_documents(documents_BL: Tensor) -> Tensor | None:
    """The document ids for a mask; None where every row is one document, for which attention has a faster path."""
    return documents_BL if bool((documents_BL != documents_BL[:, :1]).any()) else None


class NextToken(Objective):
    """``loss = sum_i -log p(x_{i+1} | x_{<=i}) / (number of targets)``, causal inside each document."""

    def corrupt(self, rows: Rows, rng: RowRng) -> NoisedBatch:
        """Drops the last token of each row from the inputs; draws nothing."""
        tokens_BL, documents_BL = rows.tokens_BS[:, :-1].contiguous(), rows.documents_BS[:, :-1].contiguous()
        valid_BL = next_token_targets(rows)
        targets_T = rows.tokens_BS[:, 1:][valid_BL]
        return NoisedBatch(
            inputs={
                "tokens_BL": tokens_BL,
                "positions_BL": document_positions(documents_BL),
                "mask": CausalMask(length=tokens_BL.shape[1], documents_BL=packed_documents(documents_BL)),
            },
            counts={"targets": float(targets_T.numel())},
            targets={"positions_T": flat_positions(valid_BL, row_stride=tokens_BL.shape[1]), "targets_T": targets_T},
        )

    def terms(self, noised: NoisedBatch) -> list[HeadTerm]:
        """One cross entropy, ``ntp``."""
        return [CrossEntropyTerm(name="ntp", **noised.targets)]


@OBJECTIVES.register
class NextTokenConfig(ObjectiveConfig):
    """Next-token prediction, the causal language-model loss."""

    name: Literal["next_token"] = "next_token"

    def build(self, ids: TokenIds) -> NextToken:
        """The objective; it needs no special id."""
        return NextToken()
