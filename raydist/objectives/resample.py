"""Resample-Previous-Tokens: one causal model that predicts the next token and, in permuted windows, the previous one.

Source: Gat et al. 2025, "Corrector Sampling in Language Models", arXiv 2506.06215.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raydist.config.registries import OBJECTIVES
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.target_offsets import OFFSET_FEATURE, TargetOffsets
from raydist.core.terms import CrossEntropyTerm, HeadTerm, TermResult
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import CausalMask, document_positions
from raydist.objectives.base import LossTerms, Needs, NoisedBatch, Objective, ObjectiveConfig
from raydist.objectives.next_token import NextToken, flat_positions, next_token_targets, packed_documents
from raydist.objectives.window_permutation import Permutation, leftmost_disjoint, permuted_order, windows_fit

KINDS = ("ntp", "ptp", "skip")


class Resample(Objective):
    """Cross entropy on rows in which disjoint windows of w adjacent tokens are permuted.

    With ``sigma_j`` the old position of the token in slot j and ``tau_j = sigma_{j+1}`` that of the token it must predict::

        input_j = x[sigma_j] + E_offset[tau_j - sigma_j]
        loss = sum_j -log p(x[tau_j] | inputs 0..j) / (number of targets)

    Attention is causal over slots. For w = 2 a permuted window is ``(x_{i+1}, x_i)``: the slot before it learns to skip
    ahead, p(x_{i+1} | x_<i), and the slot of x_{i+1} learns the previous-token prediction p(x_i | x_<i, x_{i+1}).
    The table E_offset starts at zero, so that step 0 is the model it starts from.

    The three terms part the targets by what their slot has seen of the old order: exactly the tokens before the target
    (``ntp``), some token behind it (``ptp``), or only tokens before it and not all of them (``skip``). They have the same
    weight and share one denominator.

    Choices where the paper's text was not available: a permuted row is scanned from the left; at each token a window opens
    with ``window_probability``, and the scan goes on behind it. Windows hold no token that the loss mask excludes, no
    beginning-of-text or padding token, and not the first token of a document, whose predecessor is another document.
    Hence no window crosses a document boundary either.
    """

    def __init__(self, config: ResampleConfig, *, fixed_ids: tuple[int, ...]) -> None:
        self.config = config
        self.fixed_ids = fixed_ids
        self.offsets = TargetOffsets(config.window)
        self.needs = Needs(input_features={OFFSET_FEATURE: self.offsets.num_values})

    def corrupt(self, rows: Rows, rng: RowRng) -> NoisedBatch:
        """Permutes windows of each row, then parts inputs and targets by one shift."""
        order_BS = self.order(rows, rng)
        sources_BL, targets_BL = order_BS[:, :-1], order_BS[:, 1:]
        documents_BL = rows.documents_BS[:, :-1].contiguous()
        tokens_BS = rows.tokens_BS.gather(1, order_BS)
        positions_BL = document_positions(documents_BL)
        if self.config.rotary_positions == "content":
            positions_BL = document_positions(rows.documents_BS).gather(1, sources_BL)
        valid_BL = next_token_targets(rows)  # windows stay where it is the same before and after
        kinds_BL = target_kinds(order_BS)
        targets = {}
        for kind, name in enumerate(KINDS):
            chosen_BL = valid_BL & (kinds_BL == kind)
            targets[f"{name}_positions_T"] = flat_positions(chosen_BL, row_stride=chosen_BL.shape[1])
            targets[f"{name}_targets_T"] = tokens_BS[:, 1:][chosen_BL]
        return NoisedBatch(
            inputs={
                "tokens_BL": tokens_BS[:, :-1].contiguous(),
                "positions_BL": positions_BL,
                "mask": CausalMask(length=documents_BL.shape[1], documents_BL=packed_documents(documents_BL)),
                "features": {OFFSET_FEATURE: self.offsets.rows(targets_BL - sources_BL)},
            },
            counts={"targets": float(valid_BL.sum())},
            targets=targets,
        )

    def order(self, rows: Rows, rng: RowRng) -> Tensor:
        """Sigma for all S tokens of each row, int64 ``[B, S]``."""
        num_tokens, width = rows.tokens_BS.shape[1], self.config.window
        opens_BS = rng.uniform("resample/window", num_tokens) < self.config.window_probability
        permuted_B1 = rng.uniform("resample/row", 1) < self.config.row_probability
        candidates_BS = opens_BS & permuted_B1 & windows_fit(self._movable(rows), width=width)
        return permuted_order(
            leftmost_disjoint(candidates_BS, width=width),
            rng.uniform("resample/permutation", num_tokens),
            width=width,
            permutation=self.config.permutation,
        )

    def terms(self, noised: NoisedBatch) -> list[HeadTerm]:
        """Three cross entropies over one denominator, some of which may have no position."""
        return [
            CrossEntropyTerm(
                name=name,
                positions_T=noised.targets[f"{name}_positions_T"],
                targets_T=noised.targets[f"{name}_targets_T"],
            )
            for name in KINDS
        ]

    def for_validation(self) -> MeasuredResample:
        """Also next-token prediction on the rows in order."""
        return MeasuredResample(self.config, fixed_ids=self.fixed_ids)

    def _movable(self, rows: Rows) -> Tensor:
        movable_BS = ~torch.isin(rows.tokens_BS, torch.tensor(self.fixed_ids, dtype=torch.int64))
        movable_BS[:, 0] = False
        movable_BS[:, 1:] &= rows.documents_BS[:, 1:] == rows.documents_BS[:, :-1]
        return movable_BS if rows.loss_mask_BS is None else movable_BS & rows.loss_mask_BS


class MeasuredResample(Resample):
    """The same loss, and beside it next-token prediction on the same rows in order: twice the rows in a forward.

    ``loss/ntp`` is that of the rows in order, over all their targets. So models that were trained with different windows are
    compared by one quantity, which is also that of :class:`~raydist.objectives.next_token.NextToken`.
    """

    def corrupt(self, rows: Rows, rng: RowRng) -> NoisedBatch:
        """The permuted rows, and behind them the rows in order."""
        permuted, in_order = super().corrupt(rows, rng), NextToken().corrupt(rows, rng)
        offsets_BL = permuted.inputs["features"][OFFSET_FEATURE]
        ahead_BL = torch.full_like(offsets_BL, self.offsets.next_token_row)
        documents_BL = in_order.inputs["mask"].documents_BL
        return NoisedBatch(
            inputs={
                "tokens_BL": torch.cat([permuted.inputs["tokens_BL"], in_order.inputs["tokens_BL"]]),
                "positions_BL": torch.cat([permuted.inputs["positions_BL"], in_order.inputs["positions_BL"]]),
                "mask": CausalMask(
                    length=offsets_BL.shape[1],
                    documents_BL=None if documents_BL is None else documents_BL.repeat(2, 1),
                ),
                "features": {OFFSET_FEATURE: torch.cat([offsets_BL, ahead_BL])},
            },
            counts=permuted.counts,
            targets={
                **permuted.targets,
                "in_order_positions_T": in_order.targets["positions_T"] + offsets_BL.numel(),
                "in_order_targets_T": in_order.targets["targets_T"],
            },
        )

    def terms(self, noised: NoisedBatch) -> list[HeadTerm]:
        """Those of the loss, and ``ntp`` of the rows in order."""
        in_order = CrossEntropyTerm(
            name="ntp",
            positions_T=noised.targets["in_order_positions_T"],
            targets_T=noised.targets["in_order_targets_T"],
        )
        return [*super().terms(noised), in_order]

    def combine(self, results: Sequence[TermResult]) -> LossTerms:
        """The loss of the permuted rows; ``loss/ntp`` of the others."""
        *permuted, in_order = results
        loss, measured = super().combine(permuted), super().combine([in_order])
        return LossTerms(sums=loss.sums, metrics={**loss.metrics, **measured.metrics})


def target_kinds(order_BS: Tensor) -> Tensor:
    """What each slot predicts, given what it and the slots before it hold, as an index of ``KINDS``, ``[B, S - 1]``."""
    targets_BL = order_BS[:, 1:]
    behind_target_BL = order_BS[:, :-1].cummax(dim=1).values > targets_BL
    ahead_BL = targets_BL > torch.arange(1, order_BS.shape[1], device=order_BS.device)
    return torch.where(behind_target_BL, KINDS.index("ptp"), torch.where(ahead_BL, KINDS.index("skip"), 0))


@OBJECTIVES.register
class ResampleConfig(ObjectiveConfig):
    """Resample-Previous-Tokens: next-token prediction on rows with permuted windows (Gat et al. 2025)."""

    name: Literal["resample"] = "resample"
    window: int = Field(default=2, ge=2, le=16)
    """Adjacent tokens that are permuted together, w; the paper trains with 2 and 3."""
    row_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of rows that are permuted at all, q; our choice."""
    window_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability that a window opens at a token that is not in one, s; our choice."""
    permutation: Permutation = "rotate"
    """rotate: one token moves to the end of its window, what the sampler asks for; swap: the same, for windows of 2;
    random: any order."""
    rotary_positions: Literal["slots", "content"] = "slots"
    """slots: a token takes the rotary position of its place in the input; content: it keeps that of its place in the text.
    Our choice: with slots a token never attends to a later position, which pretrained weights have not met, and the slot
    before is at distance 1 always; the offset tells the rest."""

    @model_validator(mode="after")
    def _two_tokens_swap(self) -> ResampleConfig:
        if self.permutation == "swap" and self.window != 2:
            raise ValueError(f"permutation=swap is for window=2, not {self.window}; use rotate or random")
        return self

    def build(self, ids: TokenIds) -> Resample:
        """The objective; beginning-of-text and padding tokens, where the vocabulary has them, stay in their places.

        A padding token that is the end-of-text token as well, as in many tokenizers, may move: the sampler asks what comes
        before it.
        """
        pad = None if ids.pad == ids.eos else ids.pad
        return Resample(self, fixed_ids=tuple(i for i in (ids.bos, pad) if i is not None))
