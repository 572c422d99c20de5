"""The three-way path: on its way from mask to data a token may be a random one. An example of a path given by its laws."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import choice
from raydist.config.registries import PATHS, SCHEDULES
from raydist.core.token_ids import TokenIds
from raydist.paths.base import PathConfig
from raydist.paths.kinetic import FluxRule, KineticPath
from raydist.paths.on_device import OnDevice
from raydist.paths.schedules import PolynomialSchedule, Schedule
from raydist.paths.sources import MaskSource, UniformLaw


class ThreeWayPath(KineticPath):
    """``p_t = kappa delta_{x1} + r kappa (1 - kappa) uniform + (1 - kappa) (1 - r kappa) delta_{mask}``.

    The three-way path of Gat et al. 2024 (arXiv 2407.15595); how large the uniform part is between its zeros at both ends
    is our choice.
    """

    def __init__(self, *, schedule: Schedule, randomness: float, ids: TokenIds, flux_rule: FluxRule) -> None:
        super().__init__(source=MaskSource().build(ids), flux_rule=flux_rule)
        self._schedule = schedule
        self._randomness = randomness
        every_V = torch.arange(ids.vocab_size)
        self._mask_V = OnDevice(self.source.probability(every_V))
        self._uniform_V = OnDevice(UniformLaw(ids).probability(every_V))

    def laws(self, clean_N: Tensor, time_N: Tensor) -> Tensor:
        """The three parts."""
        kappa_N1 = self._schedule.value(time_N)[:, None]
        mask_V, uniform_V = (law(clean_N.device).to(time_N.dtype) for law in (self._mask_V, self._uniform_V))
        one_hot_NV = torch.nn.functional.one_hot(clean_N, self.vocab_size).to(time_N.dtype)
        random_N1 = self._randomness * kappa_N1
        return kappa_N1 * one_hot_NV + (1 - kappa_N1) * (random_N1 * uniform_V + (1 - random_N1) * mask_V)


@PATHS.register
class ThreeWayPathConfig(PathConfig):
    """From the mask through random tokens to the data, with the velocity of least kinetic energy."""

    name: Literal["three_way"] = "three_way"
    schedule: choice(SCHEDULES, Schedule) = PolynomialSchedule()  # type: ignore[valid-type]
    """How much of the data is there at time t."""
    randomness: float = Field(default=0.5, ge=0, le=1)
    """r: of the tokens that are not data yet, the share ``r kappa`` is random."""
    flux_rule: FluxRule = "kinetic_optimal"
    """Which of the valid velocities."""

    def build(self, ids: TokenIds) -> ThreeWayPath:
        """The path; raises ConfigError for a vocabulary without a mask id."""
        return ThreeWayPath(schedule=self.schedule, randomness=self.randomness, ids=ids, flux_rule=self.flux_rule)
