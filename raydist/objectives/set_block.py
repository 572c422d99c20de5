"""Set Block Decoding: next-token prediction plus masked prediction inside short blocks, with the same weights.

Source: Gat et al. 2025, "Set Block Decoding is a Language Model Inference Accelerator", arXiv 2509.04185, section 3.1,
Algorithm 1 and eq. 13-14.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator

from raydist.config.registries import OBJECTIVES
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.terms import CrossEntropyTerm, HeadTerm, TermResult
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import SetBlockMask, document_positions
from raydist.objectives.base import LossTerms, Mean, Needs, NoisedBatch, Objective, ObjectiveConfig, require_mask_id
from raydist.objectives.next_token import flat_positions, next_token_targets, packed_documents


class SetBlock(Objective):
    """The doubled-sequence loss of Set Block Decoding.

    With clean tokens ``x`` and a copy ``x^`` in which each token is the mask id with probability ``eta ~ U(0, 1)``, the
    model reads ``[x ; x^]``: clean positions are causal, a noised position sees the clean tokens of all earlier blocks
    and the noised tokens of its own block. Clean and noised token i share position i. Then::

        ntp = sum over i of -log p(x_{i+1} | x_{<=i})
        matp = sum over masked i of -log p(x_i | clean x before i's block, noised x^ of i's block)
        loss = (ntp + w matp) / (number of ntp targets + w number of matp targets)

    The first sum reads the head shifted by one (``ntp``), the second unshifted (``matp``). Both share one denominator, and
    there is no 1/eta weight: the masked term is not a likelihood bound. The paper's loss has ``w = 1``; other values of
    ``masked_weight`` are ours, for a balance of the two.

    Choices where the paper is silent or divided: a last block shorter than the block size keeps its loss (as in the
    paper's listing; eq. 14 drops it); tokens that the loss mask excludes (prompts) are never masked, because a sampler
    never has to guess them; blocks are counted from the start of the row, and a block that spans two documents is split
    by the document boundary.
    """

    needs = Needs(sequence_factor=2, bidirectional=True)

    def __init__(self, *, mask_id: int, block_size_min: int, block_size_max: int, masked_weight: float = 1.0) -> None:
        self.mask_id = mask_id
        self.masked_weight = masked_weight
        self.block_size_min = block_size_min
        self.block_size_max = block_size_max

    def corrupt(self, rows: Rows, rng: RowRng) -> NoisedBatch:
        """Masks a copy of each row. One block size for the whole optimizer step, one mask probability per row."""
        clean_BL, documents_BL = rows.tokens_BS[:, :-1], rows.documents_BS[:, :-1].contiguous()
        length = clean_BL.shape[1]
        block_size = rng.step_integer("set_block/block_size", low=self.block_size_min, high=self.block_size_max)
        masked_BL = rng.uniform("set_block/mask", length) < rng.uniform("set_block/eta", 1)
        if rows.loss_mask_BS is not None:
            masked_BL = masked_BL & rows.loss_mask_BS[:, :-1]
        noised_BL = clean_BL.masked_fill(masked_BL, self.mask_id)
        predicts_next_BL = next_token_targets(rows)
        targets = {
            "ntp_positions_T": flat_positions(predicts_next_BL, row_stride=2 * length),
            "ntp_targets_T": rows.tokens_BS[:, 1:][predicts_next_BL],
            "matp_positions_T": flat_positions(masked_BL, row_stride=2 * length, offset=length),
            "matp_targets_T": clean_BL[masked_BL],
        }
        if self.masked_weight != 1.0:
            targets["matp_weights_T"] = torch.full(targets["matp_targets_T"].shape, self.masked_weight)
        num_targets = targets["ntp_targets_T"].numel() + self.masked_weight * targets["matp_targets_T"].numel()
        return NoisedBatch(
            inputs={
                "tokens_BL": torch.cat([clean_BL, noised_BL], dim=1),
                "positions_BL": document_positions(documents_BL).repeat(1, 2),
                "mask": SetBlockMask(length=length, block_size=block_size, documents_BL=packed_documents(documents_BL)),
            },
            counts={"targets": float(num_targets)},
            targets=targets,
        )

    def terms(self, noised: NoisedBatch) -> list[HeadTerm]:
        """Two cross entropies over one denominator: ``ntp`` on the clean half, ``matp`` on the noised half."""
        return [
            CrossEntropyTerm(
                name=name,
                positions_T=noised.targets[f"{name}_positions_T"],
                targets_T=noised.targets[f"{name}_targets_T"],
                weights_T=noised.targets.get(f"{name}_weights_T"),
            )
            for name in ("ntp", "matp")
        ]

    def combine(self, results: Sequence[TermResult]) -> LossTerms:
        """Adds to the base's metrics ``masked_per_ntp``: masked targets per next-token target, about 1/2 on average."""
        loss = super().combine(results)
        ntp, matp = loss.metrics["loss/ntp"], loss.metrics["loss/matp"]
        return LossTerms(
            sums=loss.sums, metrics={**loss.metrics, "masked_per_ntp": Mean(total=matp.count, count=ntp.count)}
        )


@OBJECTIVES.register
class SetBlockConfig(ObjectiveConfig):
    """Set Block Decoding: next-token prediction plus masked prediction inside short blocks (Gat et al. 2025)."""

    name: Literal["set_block"] = "set_block"
    block_size_min: int = Field(default=2, ge=1)
    """Smallest block size; the block size of a step is uniform between the two, both included."""
    block_size_max: int = Field(default=16, ge=1)
    """Largest block size."""
    masked_weight: PositiveFloat = 1.0
    """Weight of the masked term against the next-token term; 1 is the paper's."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> SetBlockConfig:
        if self.block_size_min > self.block_size_max:
            raise ValueError(f"block_size_min={self.block_size_min} is above block_size_max={self.block_size_max}")
        return self

    def build(self, ids: TokenIds) -> SetBlock:
        """The objective.

        Raises:
            ConfigError: the vocabulary has no mask id.
        """
        mask_id = require_mask_id(ids, objective=self.name)
        return SetBlock(
            mask_id=mask_id,
            block_size_min=self.block_size_min,
            block_size_max=self.block_size_max,
            masked_weight=self.masked_weight,
        )
