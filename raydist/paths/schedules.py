"""How much of the data is there at time t: ``kappa_t`` with ``kappa_0 = 0`` (noise) and ``kappa_1 = 1`` (data)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from raydist.config.base import StrictModel
from raydist.config.registries import SCHEDULES


class Schedule(StrictModel, ABC):
    """A schedule ``kappa_t``, increasing on [0, 1]; the same for every token.

    All methods are elementwise on float tensors and keep their dtype.
    """

    name: str

    @abstractmethod
    def value(self, time: Tensor) -> Tensor:
        """``kappa_t``."""

    @abstractmethod
    def derivative(self, time: Tensor) -> Tensor:
        """``d kappa_t / dt``."""

    @abstractmethod
    def inverse(self, kappa: Tensor) -> Tensor:
        """The time t with ``kappa_t = kappa``."""

    def jump_rate(self, time: Tensor) -> Tensor:
        """``lambda_t = (d kappa_t / dt) / (1 - kappa_t)``, the rate at which a token of a mixture path turns into data,
        and the weight of the masked loss. Infinite at t = 1.
        """
        return self.derivative(time) / (1 - self.value(time))

    def jump_probability(self, start: Tensor, stop: Tensor) -> Tensor:
        """``(kappa_stop - kappa_start) / (1 - kappa_start)``: the exact probability that a token that is still noise at
        ``start`` is data at ``stop``; 1 at ``stop = 1``.
        """
        kappa = self.value(start)
        return ((self.value(stop) - kappa) / (1 - kappa)).clamp(0, 1)


@SCHEDULES.register
class LinearSchedule(Schedule):
    """``kappa_t = t``."""

    name: Literal["linear"] = "linear"

    def value(self, time: Tensor) -> Tensor:
        """``t``."""
        return time

    def derivative(self, time: Tensor) -> Tensor:
        """``1``."""
        return torch.ones_like(time)

    def inverse(self, kappa: Tensor) -> Tensor:
        """``kappa``."""
        return kappa
