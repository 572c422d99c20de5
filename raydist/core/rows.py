"""The record that travels from the loader to the objective."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One batch of rows of clean tokens (CPU tensors).

    ``S = seq_len + 1``: a row carries one token more than the model sees, so that every position has a next token.

    Attributes:
        step: the optimizer step the rows belong to.
        tokens_BS: token ids, int64 ``[B, S]``.
        documents_BS: which document of the row a token belongs to, int16 or int32 ``[B, S]``, counting up from 0 in each
            row: numbers to compare, not to calculate with.
        loss_mask_BS: False where a token must not be a target (prompts), bool ``[B, S]``; None if all may.
        rows_B: global row id, int64 ``[B]``, unique over all datasets of a mixture; keys the noise.
        epochs_B: how often the row was read before, int64 ``[B]``; keys the noise.
        samples_B: the row's number in the whole run, int64 ``[B]``, consecutive inside a step; None where there is no run.
    """

    step: int
    tokens_BS: Tensor
    documents_BS: Tensor
    loss_mask_BS: Tensor | None
    rows_B: Tensor
    epochs_B: Tensor
    samples_B: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens_BS.shape[0]

    def narrow(self, start: int, stop: int) -> Rows:
        """Rows ``[start, stop)``, as views."""
        return Rows(
            step=self.step,
            tokens_BS=self.tokens_BS[start:stop],
            documents_BS=self.documents_BS[start:stop],
            loss_mask_BS=None if self.loss_mask_BS is None else self.loss_mask_BS[start:stop],
            rows_B=self.rows_B[start:stop],
            epochs_B=self.epochs_B[start:stop],
            samples_B=None if self.samples_B is None else self.samples_B[start:stop],
        )
