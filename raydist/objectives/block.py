"""Block diffusion: autoregressive over blocks, masked diffusion inside a block.

Source: Arriola et al. 2025, "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models" (BD3-LM),
arXiv 2503.09573.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from raydist.config.registries import OBJECTIVES
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import BlockDiffusionMask, document_positions
from raydist.objectives.base import Needs, NoisedBatch, ObjectiveConfig, require_mask_id
from raydist.objectives.masked_prediction import MaskedPrediction, Weighting
from raydist.objectives.next_token import packed_documents
from raydist.paths.time import TimeSampling

_NEARLY_NO_MASKS = 0.01


class Block(MaskedPrediction):
    """The doubled-sequence loss of block diffusion.

    The model reads ``[x ; x^]``: the clean copy is block-causal, a noised block sees itself and all earlier clean blocks
    (:class:`raydist.models.mask_spec.BlockDiffusionMask`). Each block b draws a mask rate ``r_b``; each of its tokens is
    masked with that probability. Then::

        loss = sum over blocks b, masked i in b of (1 / r_b) -log p(x_i | clean x before b, noised x^ of b) / (number of tokens)

    With ``r ~ U(0, 1)`` its mean bounds ``-log p(x)`` per token from above, with equality for exact conditionals. Rates
    clipped to ``[mask_rate_min, mask_rate_max]`` lower the variance of the gradient; the loss is then a mean over that
    range, and a bound only for blocks of one token, for which every rate gives the same.

    With ``shift`` token i is read at position i - 1: in the noised copy inside a block, in the clean copy at its start,
    where it does not see the rest of its block. A block size of 1 with all tokens masked is then the next-token
    loss.

    Our choices: the schedule is the mask rate itself, because the bound does not depend on the schedule; blocks are counted
    from the start of the row, a document's border splits a block, and a last block shorter than the others keeps its loss;
    prompts (tokens that the loss mask excludes) are never masked.
    """

    needs = Needs(sequence_factor=2, bidirectional=True)

    def __init__(self, config: BlockConfig, *, mask_id: int) -> None:
        whole_range = config.mask_rate_min <= _NEARLY_NO_MASKS and config.mask_rate_max == 1.0
        super().__init__(
            mask_id=mask_id,
            weighting=config.weighting,
            shift=config.shift,
            is_bound=config.weighting == "jump_rate" and (whole_range or config.block_size == 1),
        )
        self.config = config

    def corrupt(self, rows: Rows, rng: RowRng) -> NoisedBatch:
        """Masks a copy of each row, each block at a rate of its own."""
        clean_BL, documents_BL = rows.tokens_BS[:, :-1], rows.documents_BS[:, :-1].contiguous()
        length, block_size = clean_BL.shape[1], self.config.block_size
        candidates_BL = self.candidates(rows, documents_BL)
        rates_BL = self.mask_rates(rng, length=length)
        masked_BL = candidates_BL & (rng.uniform("block/mask", length) < rates_BL)
        inputs: dict[str, Any] = {
            "tokens_BL": torch.cat([clean_BL, clean_BL.masked_fill(masked_BL, self.mask_id)], dim=1),
            "positions_BL": document_positions(documents_BL).repeat(1, 2),
            "mask": BlockDiffusionMask(
                length=length, block_size=block_size, documents_BL=packed_documents(documents_BL)
            ),
        }
        return self.noised_batch(
            inputs,
            clean_BL=clean_BL,
            masked_BL=masked_BL,
            candidates_BL=candidates_BL,
            weights_BL=1 / rates_BL,
            read_at_L=self._read_at(length),
        )

    def mask_rates(self, rng: RowRng, *, length: int) -> Tensor:
        """Each block's rate at all of its positions, uniform on ``(mask_rate_min, mask_rate_max]``, float32 ``[B, L]``."""
        times = TimeSampling(kind=self.config.rates, low=0.0, high=1.0)
        time_BL = times.per_block(rng, length=length, block_size=self.config.block_size, purpose="block/rate")
        span = self.config.mask_rate_max - self.config.mask_rate_min
        return self.config.mask_rate_min + span * (1 - time_BL)

    def _read_at(self, length: int) -> Tensor:
        """The column of ``[clean ; noised]`` at which token i is read, int64 ``[L]``."""
        index_L = torch.arange(length)
        if not self.shift:
            return length + index_L
        return torch.where(index_L % self.config.block_size == 0, index_L - 1, length + index_L - 1)


@OBJECTIVES.register
class BlockConfig(ObjectiveConfig):
    """Block diffusion: masked diffusion inside blocks that follow each other autoregressively (BD3-LM)."""

    name: Literal["block"] = "block"
    block_size: PositiveInt = 16
    """Tokens per block; the sampler takes the same."""
    mask_rate_min: float = Field(default=0.001, ge=0, le=1)
    """Least mask rate of a block."""
    mask_rate_max: float = Field(default=1.0, gt=0, le=1)
    """Largest mask rate of a block; a smaller range around the middle trains with less variance."""
    rates: Literal["uniform", "antithetic", "stratified"] = "stratified"
    """How the mask rates of different rows and blocks depend on each other; each is uniform on the range by itself."""
    weighting: Weighting = "jump_rate"
    """jump_rate: one over the mask rate, the likelihood bound; none: the mean cross entropy of masked tokens."""
    shift: bool = False
    """Predict token i at position i - 1, so that a next-token model as a base keeps its read-out."""

    @model_validator(mode="after")
    def _range_is_in_order(self) -> BlockConfig:
        if self.mask_rate_min > self.mask_rate_max:
            raise ValueError(f"mask_rate_min={self.mask_rate_min} is above mask_rate_max={self.mask_rate_max}")
        return self

    def build(self, ids: TokenIds) -> Block:
        """The objective.

        Raises:
            ConfigError: the vocabulary has no mask id.
        """
        return Block(self, mask_id=require_mask_id(ids, objective=self.name))
