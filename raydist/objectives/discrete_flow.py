"""Discrete Flow Matching: learn the law of the clean tokens given a point of a probability path.

Source: Gat et al. 2024, "Discrete Flow Matching", arXiv 2407.15595, eq. 28; Shaul et al. 2025, "Flow Matching with General
Discrete Paths: A Kinetic-Optimal Perspective", arXiv 2412.03487, for the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import choice
from raydist.config.registries import OBJECTIVES, PATHS
from raydist.core.errors import ConfigError
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.terms import HeadTerm, TermResult
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import FullMask, document_positions
from raydist.objectives.base import LossTerms, Mean, Needs, NoisedBatch, Objective, ObjectiveConfig
from raydist.objectives.flow_bound import (
    MAX_TABLE_TOKENS,
    CrossEntropyPerToken,
    PerToken,
    bound_term,
    covers_path,
    has_bound,
)
from raydist.objectives.next_token import flat_positions, packed_documents
from raydist.paths.base import Path, PathConfig
from raydist.paths.time import TimeSampling


class DiscreteFlow(Objective):
    """The probability denoiser ``P_i = p_{1|t}(. | x_t)`` at every position i, with attention both ways inside a document.

    A row is drawn from the path at one time t of its own: ``x_t ~ p_t(. | x0, x1)``. Then, over positions that carry
    loss::

        ce:    sum_i weight_t -log P_i[x1_i]
        elbo:  sum_i sum_{y != x_t} { v(y) - u(y) + u(y) log(u(y) / v(y)) }

    with the path's rates ``u(y) = u_t(y, x_t | x1_i)`` and the model's, ``v(y) = sum_x1 P_i[x1] u_t(y, x_t | x1)``. The mean
    of the second over t bounds ``-log p(x1)`` from above. For mixture paths with jump rates ``lambda = lambda_t`` it is ::

        sum_i { sum_y lambda(y) P_i[y] - lambda(x_t) P_i[x_t] - 1[x_t != x1_i] lambda(x1_i) (1 + log P_i[x1_i]) }

    and for the mask source the first with ``weight_t = lambda_t``. Validation measures the bound whatever the loss is
    (:class:`MeasuredFlow`), wherever nearly all times are drawn.

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
        num_free = (~given_BL).sum()
        num_targets = num_free if self.is_per_token else loss_BL.sum()
        targets = {
            "positions_T": flat_positions(loss_BL, row_stride=length, offset=-int(self.config.shift)),
            "targets_T": clean_BL[loss_BL],
            "current_T": tokens_BL[loss_BL],
            "times_T": time_B1.expand(-1, length)[loss_BL],
            "num_targets": num_free,
        }
        if self.config.loss == "ce" and self.config.weighting == "jump_rate" and self.path.rates is not None:
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
        return self.is_per_token and covers_path(self.config.time, self.config.path, self.path)

    def for_validation(self) -> DiscreteFlow:
        """Itself where its loss is the bound or where there is none, else a :class:`MeasuredFlow`."""
        measurable = has_bound(self.path) and covers_path(self.config.time, self.config.path, self.path)
        return MeasuredFlow(self.config, path=self.path) if measurable and not self.is_bound else self

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
        if self.config.loss == "elbo":
            return [bound_term(self.path, **noised.targets)]
        known = {name: value for name, value in noised.targets.items() if name not in ("current_T", "times_T")}
        return [CrossEntropyPerToken(name="ce", **known)]

    def combine(self, results: Sequence[TermResult]) -> LossTerms:
        """Adds to the base's metrics ``bound_nats_per_token`` where the loss is a bound."""
        loss = super().combine(results)
        return _with_bound(loss, results[0]) if self.is_bound else loss


class MeasuredFlow(DiscreteFlow):
    """The same loss, and beside it the bound of the likelihood, on the same draws: one more pass through the head.

    So models that were trained with different losses, weights, schedules and paths are compared by one quantity.
    """

    def terms(self, noised: NoisedBatch) -> list[HeadTerm]:
        """The loss and the bound. With masks for noise, tokens that are data count nothing in it."""
        weights_T = None
        if self.path.absorbing_id is not None and self.config.copy_loss:
            weights_T = (noised.targets["current_T"] == self.path.absorbing_id).float()
        return [*super().terms(noised), bound_term(self.path, **{**noised.targets, "weights_T": weights_T})]

    def combine(self, results: Sequence[TermResult]) -> LossTerms:
        """Adds ``bound_nats_per_token`` to what the loss reports."""
        loss, bound = results
        return _with_bound(super().combine([loss]), bound)


def _with_bound(loss: LossTerms, result: TermResult) -> LossTerms:
    assert isinstance(result.term, PerToken)
    bound = Mean(total=result.loss_sum.detach(), count=result.term.num_targets.to(result.loss_sum.dtype))
    return LossTerms(sums=loss.sums, metrics={**loss.metrics, "bound_nats_per_token": bound})


@OBJECTIVES.register
class DiscreteFlowConfig(ObjectiveConfig):
    """Discrete Flow Matching: predict clean tokens from a point of any probability path (Gat et al. 2024)."""

    name: Literal["discrete_flow"] = "discrete_flow"
    path: choice(PATHS, PathConfig) = Field(default_factory=lambda: {"name": "mixture"})  # type: ignore[valid-type]
    """From noise to data, with its source, schedule and coupling."""
    loss: Literal["ce", "elbo"] = "ce"
    """ce: cross entropy, for every path; elbo: the bound of the likelihood, for mixture paths and small vocabularies."""
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
        if self.weighting == "jump_rate" and path.rates is None:
            raise ConfigError(
                "this path has no jump rates: they are those of mixture paths",
                where="objective.weighting",
                found=f"jump_rate with path {self.path.name}",
                expected="none, which trains every path",
                fix="objective.weighting=none",
            )
        if self.loss == "elbo" and not has_bound(path):
            raise ConfigError(
                "the bound of this path needs the rates between all pairs of tokens",
                where="objective.loss",
                found=f"elbo with path {self.path.name} over {path.vocab_size} tokens",
                expected=f"at most {MAX_TABLE_TOKENS} tokens, or a mixture path",
                fix="objective.loss=ce, which trains every path",
            )
        return DiscreteFlow(self, path=path)
