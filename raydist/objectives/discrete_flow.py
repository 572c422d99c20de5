"""Discrete Flow Matching: learn the law of the clean tokens given a point of a probability path.

Source: Gat et al. 2024, "Discrete Flow Matching", arXiv 2407.15595, eq. 28; Shaul et al. 2025, "Flow Matching with General
Discrete Paths: A Kinetic-Optimal Perspective", arXiv 2412.03487, for the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import choice
from raydist.config.registries import OBJECTIVES, PATHS
from raydist.core.errors import ConfigError
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.terms import CrossEntropyTerm, ElboTerm, HeadTerm, TermResult
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import FullMask, document_positions
from raydist.objectives.base import LossTerms, Mean, Needs, NoisedBatch, Objective, ObjectiveConfig
from raydist.objectives.next_token import flat_positions, packed_documents
from raydist.paths.base import Path, PathConfig
from raydist.paths.schedules import Schedule
from raydist.paths.time import TimeSampling


@dataclass(frozen=True, kw_only=True)
class _CrossEntropyPerToken(CrossEntropyTerm):
    """Knows the tokens of its batch that are not given, an int64 scalar: not all of them carry loss."""

    num_targets: Tensor


@dataclass(frozen=True, kw_only=True)
class _ElboPerToken(ElboTerm):
    """The same for the bound."""

    num_targets: Tensor


class DiscreteFlow(Objective):
    """The probability denoiser ``P_i = p_{1|t}(. | x_t)`` at every position i, with attention both ways inside a document.

    A row is drawn from the path at one time t of its own: ``x_t ~ p_t(. | x0, x1)``. Then, over positions that carry
    loss::

        ce:    sum_i weight_t -log P_i[x1_i]
        elbo:  sum_i { sum_y lambda(y) P_i[y] - lambda(x_t) P_i[x_t] - 1[x_t != x1_i] lambda(x1_i) (1 + log P_i[x1_i]) }

    with ``lambda = lambda_t`` the jump rates of the mixture path. The mean of the second over t bounds
    ``-log p(x1)`` from above; for the mask source it equals the first with ``weight_t = lambda_t``.

    **Given positions** are data at every time and carry no loss: those that the coupling names, those that the loss mask
    excludes (prompts), and with ``shift`` the first token of each document, which no position precedes. In a row
    whose condition is dropped they are source tokens instead, still without loss: what a guided sampler shows for "no
    condition".

    **Revealed positions.** With the mask source a token that is no mask is known to be data, so only masked positions
    carry loss (the paper sums over all; ``copy_loss`` does). With other sources all do.

    The loss is divided by the number of positions that carry it; where it is a bound, by the number of tokens that are not
    given, so that ``loss`` is in nats per token. Times stop at ``time.high``, where the rates are about ``1 / (1 - high)``; the
    weight is not rescaled for that (our choice).
    """

    def __init__(self, config: DiscreteFlowConfig, *, path: Path) -> None:
        self.config = config
        self.path = path
        self.needs = Needs(
            bidirectional=True,
            time=path.absorbing_id is None if config.time_input is None else config.time_input,
        )

    def corrupt(self, rows: Rows, rng: RowRng) -> NoisedBatch:
        """Draws the time, the given positions, the source tokens and the point of the path."""
        clean_BL, documents_BL = rows.tokens_BS[:, :-1].contiguous(), rows.documents_BS[:, :-1].contiguous()
        length = clean_BL.shape[1]
        time_B1 = self.config.time.per_row(rng, purpose="discrete_flow/time")
        given_BL = self._given(rows, clean_BL, documents_BL, rng)
        path = self.path.in_context(clean_BL, given_BL=given_BL)
        start_BL = path.draw_start(clean_BL, uniforms_BL=rng.uniform("discrete_flow/source", length))
        dropped_B1 = rng.uniform("discrete_flow/dropout", 1) < self.config.condition_dropout
        fixed_BL = torch.where(dropped_B1, start_BL, clean_BL)
        noised_BL = path.corrupt(
            clean_BL,
            start_BL=torch.where(given_BL, clean_BL, start_BL),
            time_BL=time_B1,
            uniforms_BL=rng.uniform("discrete_flow/noise", length),
        )
        tokens_BL = torch.where(given_BL, fixed_BL, noised_BL)
        loss_BL = ~given_BL
        if self.path.absorbing_id is not None and not self.config.copy_loss:
            loss_BL = loss_BL & (tokens_BL == self.path.absorbing_id)
        inputs = {
            "tokens_BL": tokens_BL,
            "positions_BL": document_positions(documents_BL),
            "mask": FullMask(length=length, documents_BL=packed_documents(documents_BL)),
        }
        if self.needs.time:
            inputs["time_BL"] = time_B1
        num_targets = (~given_BL if self.is_per_token else loss_BL).sum()
        targets = {
            "positions_T": flat_positions(loss_BL, row_stride=length, offset=-int(self.config.shift)),
            "targets_T": clean_BL[loss_BL],
            "num_targets": num_targets,
        }
        if self.config.loss == "elbo":
            targets |= {"current_T": tokens_BL[loss_BL], "times_T": time_B1.expand(-1, length)[loss_BL]}
        elif self.config.weighting == "jump_rate" and self.path.rates is not None:
            rates_BV = self.path.rates.at(time_B1[:, 0]).expand(-1, self.path.vocab_size)
            targets["weights_T"] = rates_BV.gather(1, clean_BL)[loss_BL]
        return NoisedBatch(inputs=inputs, counts={"targets": float(num_targets)}, targets=targets)

    @property
    def is_per_token(self) -> bool:
        """Whether the loss is the integrand of a bound, and so divided by all tokens that are not given."""
        weighted = self.config.weighting == "jump_rate" and self.path.absorbing_id is not None
        return self.config.loss == "elbo" or (weighted and not self.config.copy_loss)

    @property
    def is_bound(self) -> bool:
        """Whether the mean of the loss bounds the negative log-likelihood: nearly all times must be drawn."""
        schedule = getattr(self.config.path, "schedule", None)
        return self.is_per_token and self.config.time.covers(schedule if isinstance(schedule, Schedule) else None)

    def _given(self, rows: Rows, clean_BL: Tensor, documents_BL: Tensor, rng: RowRng) -> Tensor:
        """Positions that are data at every time."""
        given_BL = self.config.path.coupling.given(clean_BL, rng)
        if rows.loss_mask_BS is not None:
            given_BL = given_BL | ~rows.loss_mask_BS[:, :-1]
        if self.config.shift:
            given_BL = given_BL | (document_positions(documents_BL) == 0)
        return given_BL

    def terms(self, noised: NoisedBatch) -> list[HeadTerm]:
        """One term, ``ce`` or ``elbo``."""
        if self.config.loss == "ce":
            return [_CrossEntropyPerToken(name="ce", **noised.targets)]
        rates = self.path.rates
        assert rates is not None  # the configuration refuses other paths
        return [_ElboPerToken(name="elbo", rates=rates, **noised.targets)]

    def combine(self, results: Sequence[TermResult]) -> LossTerms:
        """Adds to the base's metrics ``bound_nats_per_token`` where the loss is a bound."""
        loss = super().combine(results)
        if not self.is_bound:
            return loss
        (result,) = results
        assert isinstance(result.term, _CrossEntropyPerToken | _ElboPerToken)
        bound = Mean(total=result.loss_sum.detach(), count=result.term.num_targets.to(result.loss_sum.dtype))
        return LossTerms(sums=loss.sums, metrics={**loss.metrics, "bound_nats_per_token": bound})


@OBJECTIVES.register
class DiscreteFlowConfig(ObjectiveConfig):
    """Discrete Flow Matching: predict clean tokens from a point of any probability path (Gat et al. 2024)."""

    name: Literal["discrete_flow"] = "discrete_flow"
    path: choice(PATHS, PathConfig) = Field(default_factory=lambda: {"name": "mixture"})  # type: ignore[valid-type]
    """From noise to data, with its source, schedule and coupling."""
    loss: Literal["ce", "elbo"] = "ce"
    """ce: cross entropy, for every path; elbo: the bound of the likelihood, for mixture paths."""
    weighting: Literal["none", "jump_rate"] = "none"
    """Of ce: jump_rate multiplies by lambda_t = kappa'_t / (1 - kappa_t); with the mask source that is the bound."""
    copy_loss: bool = False
    """Mask source only: revealed tokens carry loss as well, as in eq. 28 of the paper; they teach a copy."""
    time: TimeSampling = TimeSampling()
    """How the time of a row is drawn."""
    time_input: bool | None = None
    """Whether the model is told the time. null: yes, unless the source is the mask, which shows it."""
    shift: bool = False
    """Predict position i from the hidden state of i - 1, so that a next-token model keeps its read-out as a base."""
    condition_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of rows whose given tokens are replaced by source tokens, for classifier-free guidance."""

    def build(self, ids: TokenIds) -> DiscreteFlow:
        """The objective.

        Raises:
            ConfigError: the loss does not exist for this path, or the vocabulary lacks a mask id that the source needs.
        """
        path: Path = self.path.build(ids)
        if path.rates is None and (self.loss == "elbo" or self.weighting == "jump_rate"):
            raise ConfigError(
                "this path has no jump rates: the bound is for mixture paths",
                where="objective.loss" if self.loss == "elbo" else "objective.weighting",
                found=f"{self.loss}, weighting {self.weighting}, with path {self.path.name}",
                expected="ce without weighting, which trains every path",
                fix="objective.loss=ce objective.weighting=none",
            )
        return DiscreteFlow(self, path=path)
