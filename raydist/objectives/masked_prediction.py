"""What the masked objectives share: a weighted cross entropy at masked positions, and when its mean is a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from raydist.core.rows import Rows
from raydist.core.terms import CrossEntropyTerm, HeadTerm, TermResult
from raydist.models.mask_spec import document_positions
from raydist.objectives.base import LossTerms, Mean, NoisedBatch, Objective

Weighting = Literal["jump_rate", "none"]


@dataclass(frozen=True, kw_only=True)
class MaskedTerm(CrossEntropyTerm):
    """Knows how many tokens of its batch might have been masked, an int64 scalar: not all of them carry loss."""

    num_candidates: Tensor


class MaskedPrediction(Objective):
    """Base of objectives whose loss is ``sum over masked i of weight_i -log p(x_i | noised text)``.

    With weights (``jump_rate``) the sum is divided by the number of tokens that might have been masked, so that the loss is
    in nats per token; without, by the number of masked tokens, so that it is their mean cross entropy.

    Attributes:
        mask_id: stands for a masked token.
        weighting: whether positions have weights.
        shift: token i is predicted at position i - 1.
        is_bound: whether the mean of the weighted loss over the noise is an upper bound of ``-log p(x)``.
    """

    def __init__(self, *, mask_id: int, weighting: Weighting, shift: bool, is_bound: bool) -> None:
        self.mask_id = mask_id
        self.weighting = weighting
        self.shift = shift
        self.is_bound = is_bound

    def candidates(self, rows: Rows, documents_BL: Tensor) -> Tensor:
        """Tokens that may be masked, bool ``[B, L]``: not those that the loss mask excludes (prompts), nor, with ``shift``,
        the first of a document, which no position precedes.
        """
        candidates_BL = document_positions(documents_BL) >= int(self.shift)
        if rows.loss_mask_BS is not None:
            candidates_BL = candidates_BL & rows.loss_mask_BS[:, :-1]
        return candidates_BL

    def noised_batch(
        self,
        inputs: dict[str, Any],
        *,
        clean_BL: Tensor,
        masked_BL: Tensor,
        candidates_BL: Tensor,
        weights_BL: Tensor,
        read_at_L: Tensor,
    ) -> NoisedBatch:
        """Puts inputs and targets together.

        Args:
            inputs: of the model.
            clean_BL: the targets.
            masked_BL: which of them carry loss.
            candidates_BL: which of them might have.
            weights_BL: of the positions, float32; used if ``weighting`` says so.
            read_at_L: the column of the model's input at which token i is read, int64.
        """
        row_stride = inputs["tokens_BL"].shape[1]
        rows_T, columns_T = masked_BL.nonzero(as_tuple=True)
        num_candidates = candidates_BL.sum()
        targets = {
            "positions_T": rows_T * row_stride + read_at_L[columns_T],
            "targets_T": clean_BL[masked_BL],
            "num_candidates": num_candidates,
        }
        if self.weighting == "jump_rate":
            targets["weights_T"] = weights_BL[masked_BL]
        count = float(num_candidates if self.weighting == "jump_rate" else rows_T.numel())
        return NoisedBatch(inputs=inputs, counts={"targets": count}, targets=targets)

    def terms(self, noised: NoisedBatch) -> list[HeadTerm]:
        """One cross entropy, ``masked``."""
        return [MaskedTerm(name="masked", **noised.targets)]

    def combine(self, results: Sequence[TermResult]) -> LossTerms:
        """Adds to the base's metrics ``masked_share``, and ``bound_nats_per_token`` where the loss is a bound."""
        loss = super().combine(results)
        (result,) = results
        assert isinstance(result.term, MaskedTerm)
        num_candidates = result.term.num_candidates.to(result.loss_sum.dtype)
        metrics = {**loss.metrics, "masked_share": Mean(loss.metrics["loss/masked"].count, num_candidates)}
        if self.is_bound:
            metrics["bound_nats_per_token"] = Mean(total=result.loss_sum.detach(), count=num_candidates)
        return LossTerms(sums=loss.sums, metrics=metrics)
