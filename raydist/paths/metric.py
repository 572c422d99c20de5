"""The metric-induced path: on their way from uniform noise to data tokens move through tokens that are near the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import StrictModel
from raydist.config.registries import PATHS
from raydist.core.token_ids import TokenIds
from raydist.paths.base import PathConfig
from raydist.paths.kinetic import KineticPath
from raydist.paths.mixture import StepRule
from raydist.paths.sources import UniformLaw
from raydist.paths.token_metric import TokenMetric, TokenMetricConfig, ValueMetricConfig

_LARGEST_EXPONENT = 1e30


class BetaSchedule(StrictModel):
    """``beta_t = c (t / (1 - t))^a``, from 0 at t = 0 to infinity at t = 1."""

    c: float = Field(default=3.0, gt=0)
    """The value at t = 1/2; 3 is stated for distances of normalised embeddings."""
    a: float = Field(default=0.9, gt=0)
    """The exponent; below 1 the derivative is infinite at t = 0."""

    def value(self, time: Tensor) -> Tensor:
        """``beta_t``."""
        return self.c * (time / (1 - time)) ** self.a

    def derivative(self, time: Tensor) -> Tensor:
        """``c a t^(a - 1) / (1 - t)^(a + 1)``."""
        return self.c * self.a * time ** (self.a - 1) / (1 - time) ** (self.a + 1)


class MetricPath(KineticPath):
    """``p_t(x | x1) = softmax_x(-beta_t d(x, x1))`` with its velocity of least kinetic energy::

        u_t(x, z | x1) = p_t(x | x1) beta_t' [d(z, x1) - d(x, x1)]_+

    Mass moves only to tokens nearer to x1 (Shaul et al. 2025, arXiv 2412.03487). The mask id is no token of the path.

    A step counts the rates with ``beta_{t+h} - beta_t`` in the place of ``h beta_t'`` (``integrated``), which is finite at t =
    0 too; with ``euler`` a rate that is infinite there counts as 0.

    Args:
        metric: the distance; two different tokens are at least ``min_distance`` apart, so that p_1 is the clean token.
        beta: inverse temperature.
        min_distance: see ``metric``.
        step_rule: see above.
        ids: the vocabulary.
    """

    def __init__(
        self, *, metric: TokenMetric, beta: BetaSchedule, min_distance: float, step_rule: StepRule, ids: TokenIds
    ) -> None:
        super().__init__(source=UniformLaw(ids))
        self._metric = metric
        self._beta = beta
        self._min_distance = min_distance
        self._step_rule = step_rule
        self._mask_id = ids.mask

    def laws(self, clean_N: Tensor, time_N: Tensor) -> Tensor:
        """``p_t(. | x1)``."""
        return self._softmax(self._distances(clean_N, time_N.dtype), time_N)

    def rates_at(self, clean_N: Tensor, *, current_N: Tensor, time_N: Tensor) -> Tensor:
        """The closed form."""
        return self._beta.derivative(time_N)[:, None] * self._rates_in_beta(clean_N, current_N, time_N)

    def tables(self, time: Tensor, *, current_G: Tensor) -> Iterator[Tensor]:
        """The closed form for all clean tokens."""
        clean_V, time_V = torch.arange(self.vocab_size, device=current_G.device), time.expand(self.vocab_size)
        distances_VV = self._distances(clean_V, time.dtype)
        flux_VV = self._beta.derivative(time) * self._softmax(distances_VV, time_V)
        for current in current_G:
            yield (distances_VV[:, current, None] - distances_VV).clamp(min=0) * flux_VV

    def step_rates(self, clean_N: Tensor, *, current_N: Tensor, start_N: Tensor, stop_N: Tensor) -> Tensor:
        """The rates in beta times the step in beta."""
        if self._step_rule == "euler":
            step_N = ((stop_N - start_N) * self._beta.derivative(start_N)).nan_to_num(posinf=0.0)
        else:
            step_N = self._beta.value(stop_N).clamp(max=_LARGEST_EXPONENT) - self._beta.value(start_N)
        return step_N[:, None] * self._rates_in_beta(clean_N, current_N, start_N)

    def _rates_in_beta(self, clean_N: Tensor, current_N: Tensor, time_N: Tensor) -> Tensor:
        """``p_t(x | x1) [d(z, x1) - d(x, x1)]_+``."""
        distances_NV = self._distances(clean_N, time_N.dtype)
        nearer_NV = (distances_NV.gather(1, current_N[:, None]) - distances_NV).clamp(min=0)
        return self._softmax(distances_NV, time_N) * nearer_NV

    def _distances(self, clean_N: Tensor, dtype: torch.dtype) -> Tensor:
        """``d(x, x1)``, ``[N, V]``."""
        distances_NV = self._metric.distances(clean_N).to(dtype).clamp(min=self._min_distance)
        return distances_NV.scatter(1, clean_N[:, None], 0.0)

    def _softmax(self, distances_NV: Tensor, time_N: Tensor) -> Tensor:
        exponents_N = self._beta.value(time_N).clamp(max=_LARGEST_EXPONENT)
        logits_NV = -exponents_N[:, None] * distances_NV
        if self._mask_id is not None:
            logits_NV[:, self._mask_id] = -torch.inf
        return torch.softmax(logits_NV, dim=1)


@PATHS.register
class MetricPathConfig(PathConfig):
    """Tokens move through tokens that are near the data under a metric."""

    name: Literal["metric"] = "metric"
    metric: TokenMetricConfig = ValueMetricConfig()
    """The distance between tokens."""
    beta: BetaSchedule = BetaSchedule()
    """The inverse temperature."""
    min_distance: float = Field(default=1e-3, gt=0)
    """Different tokens are at least this far apart: tables hold rows that are equal, and p_1 must be one token (our choice)."""
    step_rule: StepRule = "integrated"
    """How a sampler's step counts the rates: with the step in beta (integrated), or h times its derivative (euler)."""

    def build(self, ids: TokenIds) -> MetricPath:
        """The path; raises ConfigError where the embedding table cannot be read."""
        return MetricPath(
            metric=self.metric.build(vocab_size=ids.vocab_size),
            beta=self.beta,
            min_distance=self.min_distance,
            step_rule=self.step_rule,
            ids=ids,
        )
