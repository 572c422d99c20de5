"""Masked diffusion: predict masked tokens from all others, at every share of masks.

Source: Sahoo et al. 2024, "MDLM", arXiv 2406.07524; Nie et al. 2025, "LLaDA", arXiv 2502.09992; the shifted read-out is that
of Ye et al. 2025, "Dream", arXiv 2508.15487.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import choice
from raydist.config.registries import OBJECTIVES, SCHEDULES
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import FullMask, document_positions
from raydist.objectives.base import Needs, NoisedBatch, ObjectiveConfig, require_mask_id
from raydist.objectives.masked_prediction import MaskedPrediction, Weighting
from raydist.objectives.next_token import packed_documents
from raydist.paths.schedules import Schedule
from raydist.paths.time import TimeSampling


class Masked(MaskedPrediction):
    """The loss of masked diffusion, with attention both ways inside a document.

    A row draws a time t; each token is masked with probability ``1 - kappa_t``, independently. Then::

        loss = sum over masked i of lambda_t -log p(x_i | noised row) / (number of tokens that might be masked)
        lambda_t = kappa'_t / (1 - kappa_t)

    Its mean over t in [0, 1] bounds ``-log p(x)`` per token from above, with equality for exact conditionals, and does not
    depend on the schedule; the variance does. With ``kappa_t = t`` the weight is one over the mask probability.

    Prompts (tokens that the loss mask excludes) are never masked. With ``shift`` token i is read at position i - 1, masks
    included, so that a next-token model as a base keeps its read-out; the first token of a document is then never masked.

    Our choices: times stop at ``time.high``, where the weight is about ``1 / (1 - high)``; the weight is not rescaled for
    the range, so the loss is a mean over it. A row whose length is drawn keeps its shape: what lies behind it becomes a
    document of its own without loss.
    """

    needs = Needs(bidirectional=True)

    def __init__(self, config: MaskedConfig, *, mask_id: int) -> None:
        super().__init__(
            mask_id=mask_id,
            weighting=config.weighting,
            shift=config.shift,
            is_bound=config.weighting == "jump_rate" and config.time.covers(config.schedule),
        )
        self.config = config

    def corrupt(self, rows: Rows, rng: RowRng) -> NoisedBatch:
        """Masks each row at a time of its own."""
        clean_BL, documents_BL = rows.tokens_BS[:, :-1].contiguous(), rows.documents_BS[:, :-1].contiguous()
        length = clean_BL.shape[1]
        index_L = torch.arange(length)
        beyond_BL = index_L >= self._lengths(rng, length=length)
        documents_BL = torch.where(beyond_BL, documents_BL.amax(dim=1, keepdim=True) + 1, documents_BL)
        candidates_BL = self.candidates(rows, documents_BL) & ~beyond_BL
        schedule: Schedule = self.config.schedule
        time_B1 = self.config.time.per_row(rng, purpose="masked/time")
        masked_BL = candidates_BL & (rng.uniform("masked/mask", length) < schedule.remaining(time_B1))
        inputs: dict[str, Any] = {
            "tokens_BL": clean_BL.masked_fill(masked_BL, self.mask_id),
            "positions_BL": document_positions(documents_BL),
            "mask": FullMask(length=length, documents_BL=packed_documents(documents_BL)),
        }
        return self.noised_batch(
            inputs,
            clean_BL=clean_BL,
            masked_BL=masked_BL,
            candidates_BL=candidates_BL,
            weights_BL=schedule.jump_rate(time_B1).expand(-1, length),
            read_at_L=index_L - int(self.shift),
        )

    def _lengths(self, rng: RowRng, *, length: int) -> Tensor:
        """Tokens of each row that count, int64 ``[B, 1]``: all, or now and then uniform on 1..L."""
        whether_B1, where_B1 = rng.uniform("masked/length", 2).split(1, dim=1)
        drawn_B1 = 1 + (where_B1 * length).long()
        return torch.where(whether_B1 < self.config.random_length, drawn_B1, length)


@OBJECTIVES.register
class MaskedConfig(ObjectiveConfig):
    """Masked diffusion: predict masked tokens from both sides, at every share of masks (MDLM, LLaDA, Dream)."""

    name: Literal["masked"] = "masked"
    schedule: choice(SCHEDULES, Schedule) = Field(default_factory=lambda: {"name": "linear"})  # type: ignore[valid-type]
    """Share of revealed tokens at time t; linear is LLaDA's, and MDLM's log-linear noise."""
    weighting: Weighting = "jump_rate"
    """jump_rate: the likelihood bound; none: the mean cross entropy of masked tokens."""
    time: TimeSampling = TimeSampling()
    """How the time of a row is drawn; the latest time 0.999 is LLaDA's least mask probability of 0.001."""
    random_length: float = Field(default=0.0, ge=0, le=1)
    """Share of rows that are cut at a length uniform on 1..seq_len; LLaDA uses 0.01."""
    shift: bool = False
    """Predict token i at position i - 1, so that a next-token model as a base keeps its read-out (Dream)."""

    def build(self, ids: TokenIds) -> Masked:
        """The objective.

        Raises:
            ConfigError: the vocabulary has no mask id.
        """
        return Masked(self, mask_id=require_mask_id(ids, objective=self.name))
