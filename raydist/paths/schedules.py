"""How much of the data is there at time t: ``kappa_t`` with ``kappa_0 = 0`` (noise) and ``kappa_1 = 1`` (data).

The methods are closed forms in t and ``1 - t``, so that nothing cancels near either end and no ``inf - inf`` or ``0 / 0``
arises there: where a rate has no finite limit it is ``+inf``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import StrictModel
from raydist.config.registries import SCHEDULES

_INVERSE_ITERATIONS = 80
_HALF_PI = math.pi / 2


class Schedule(StrictModel, ABC):
    """A schedule ``kappa_t``, increasing on [0, 1]; the same for every token.

    All methods are elementwise on float tensors and keep their dtype. A new schedule needs :meth:`value` and
    :meth:`derivative`; the others have defaults that hold for any schedule, and closed forms where there are some.
    """

    name: str

    @abstractmethod
    def value(self, time: Tensor) -> Tensor:
        """``kappa_t``."""

    @abstractmethod
    def derivative(self, time: Tensor) -> Tensor:
        """``d kappa_t / dt``."""

    def remaining(self, time: Tensor) -> Tensor:
        """``1 - kappa_t``, without cancellation near t = 1: the probability that a token is still noise."""
        return 1 - self.value(time)

    def inverse(self, kappa: Tensor) -> Tensor:
        """The time t with ``kappa_t = kappa``.

        By default Newton steps that a shrinking bracket keeps safe, to float precision.
        """
        low, high = torch.zeros_like(kappa), torch.ones_like(kappa)
        time = torch.full_like(kappa, 0.5)
        for _ in range(_INVERSE_ITERATIONS):
            excess = self.value(time) - kappa
            low, high = torch.where(excess > 0, low, time), torch.where(excess > 0, time, high)
            newton = time - excess / self.derivative(time)
            inside = (newton > low) & (newton < high)
            time = torch.where(excess == 0, time, torch.where(inside, newton, (low + high) / 2))
        return torch.where(kappa <= 0, torch.zeros_like(time), torch.where(kappa >= 1, torch.ones_like(time), time))

    def jump_rate(self, time: Tensor) -> Tensor:
        """``lambda_t = (d kappa_t / dt) / (1 - kappa_t)``, the rate at which a token of a mixture path turns into data,
        and the weight of the masked loss. Infinite at t = 1.
        """
        return _ratio(self.derivative(time), self.remaining(time))

    def reverse_rate(self, time: Tensor) -> Tensor:
        """``(d kappa_t / dt) / kappa_t``, the rate at which a token of a mixture path turns into noise when time runs
        backward. Infinite where ``kappa_t = 0``.
        """
        return _ratio(self.derivative(time), self.value(time))

    def jump_probability(self, start: Tensor, stop: Tensor) -> Tensor:
        """``(kappa_stop - kappa_start) / (1 - kappa_start)``: the exact probability that a token that is still noise at
        ``start`` is data at ``stop``; 1 at ``stop = 1``.
        """
        return reveal_probability(self.remaining(start), self.remaining(stop))


def reveal_probability(remaining_start: Tensor, remaining_stop: Tensor) -> Tensor:
    """``1 - remaining_stop / remaining_start``, and 1 where nothing remains."""
    start, stop = torch.broadcast_tensors(remaining_start, remaining_stop)
    return torch.where(stop <= 0, torch.ones_like(stop), ((start - stop) / start).clamp(0, 1))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below <= 0, torch.full_like(below, torch.inf), above / below)


@SCHEDULES.register
class LinearSchedule(Schedule):
    """``kappa_t = t``; jump rate ``1 / (1 - t)``, 1 at t = 0."""

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


@SCHEDULES.register
class PolynomialSchedule(Schedule):
    """``kappa_t = t^n``; jump rate ``n t^(n-1) / (1 - t^n)``, at t = 0: 0 for n > 1, 1 for n = 1, infinite for n < 1."""

    name: Literal["polynomial"] = "polynomial"
    power: float = Field(default=2.0, gt=0)
    """The exponent n. 2 is the best of the cubic family on text, 3 on images (Gat et al. 2024, arXiv 2407.15595)."""

    def value(self, time: Tensor) -> Tensor:
        """``t^n``."""
        return time**self.power

    def derivative(self, time: Tensor) -> Tensor:
        """``n t^(n - 1)``."""
        return self.power * time ** (self.power - 1)

    def remaining(self, time: Tensor) -> Tensor:
        """``1 - t^n`` as ``-expm1(n log t)``."""
        return -torch.expm1(self.power * torch.log(time))

    def inverse(self, kappa: Tensor) -> Tensor:
        """``kappa^(1 / n)``."""
        return kappa ** (1 / self.power)

    def reverse_rate(self, time: Tensor) -> Tensor:
        """``n / t``."""
        return self.power / time


@SCHEDULES.register
class CubicSchedule(Schedule):
    """``kappa_t = -2t^3 + 3t^2 + a (t^3 - 2t^2 + t) + b (t^3 - t^2)``, with slope a at t = 0 and b at t = 1.

    Gat et al. 2024, arXiv 2407.15595: (a, b) = (1, 1) is ``t``, (0, 2) is ``t^2`` and (0, 3) is ``t^3``. With ``s = 1 - t``
    the two ends are mirror images: ``kappa_t = t [t (3 - b + (b - 2) t) + a s^2]`` and
    ``1 - kappa_t = s [s (3 - a + (a - 2) s) + b t^2]``. The jump rate is a at t = 0.
    """

    name: Literal["cubic"] = "cubic"
    slope_at_noise: float = Field(default=0.0, ge=0, le=3)
    """a, the slope at t = 0; both slopes in [0, 3] keep the schedule increasing."""
    slope_at_data: float = Field(default=2.0, ge=0, le=3)
    """b, the slope at t = 1."""

    def value(self, time: Tensor) -> Tensor:
        """The cubic."""
        return _hermite(time, self.slope_at_noise, self.slope_at_data)

    def derivative(self, time: Tensor) -> Tensor:
        """``a s^2 + (6 - 2a - 2b) s t + b t^2``."""
        a, b, rest = self.slope_at_noise, self.slope_at_data, 1 - time
        return (a * rest * rest + (6 - 2 * a - 2 * b) * rest * time + b * time * time).clamp(min=0)

    def remaining(self, time: Tensor) -> Tensor:
        """The mirror image of the cubic."""
        return _hermite(1 - time, self.slope_at_data, self.slope_at_noise)


def _hermite(t: Tensor, slope_here: float, slope_there: float) -> Tensor:
    """The cubic from 0 at t = 0 to 1 at t = 1 with given slopes, as a product with t."""
    rest = 1 - t
    return t * (t * ((3 - slope_there) + (slope_there - 2) * t) + slope_here * rest * rest)


@SCHEDULES.register
class CosineSchedule(Schedule):
    """``kappa_t = 1 - cos(pi t / 2)``, MaskGIT's; jump rate ``(pi / 2) tan(pi t / 2)``, 0 at t = 0."""

    name: Literal["cosine"] = "cosine"

    def value(self, time: Tensor) -> Tensor:
        """``2 sin^2(pi t / 4)``."""
        return 2 * torch.sin(_HALF_PI / 2 * time) ** 2

    def derivative(self, time: Tensor) -> Tensor:
        """``(pi / 2) sin(pi t / 2)``."""
        return _HALF_PI * torch.sin(_HALF_PI * time)

    def remaining(self, time: Tensor) -> Tensor:
        """``cos(pi t / 2)`` as ``sin(pi (1 - t) / 2)``."""
        return torch.sin(_HALF_PI * (1 - time))

    def inverse(self, kappa: Tensor) -> Tensor:
        """``(4 / pi) arcsin sqrt(kappa / 2)``."""
        return torch.asin(torch.sqrt(kappa / 2)) * (2 / _HALF_PI)

    def jump_rate(self, time: Tensor) -> Tensor:
        """``(pi / 2) tan(pi t / 2)``."""
        return _HALF_PI * _tan_half_pi(time)

    def reverse_rate(self, time: Tensor) -> Tensor:
        """``(pi / 2) cot(pi t / 4)``."""
        return _HALF_PI / torch.tan(_HALF_PI / 2 * time)


@SCHEDULES.register
class SineSchedule(Schedule):
    """``kappa_t = sin(pi t / 2)``; jump rate ``(pi / 2) cot(pi (1 - t) / 4)``, pi / 2 at t = 0."""

    name: Literal["sine"] = "sine"

    def value(self, time: Tensor) -> Tensor:
        """``sin(pi t / 2)``."""
        return torch.sin(_HALF_PI * time)

    def derivative(self, time: Tensor) -> Tensor:
        """``(pi / 2) cos(pi t / 2)``."""
        return _HALF_PI * torch.sin(_HALF_PI * (1 - time))

    def remaining(self, time: Tensor) -> Tensor:
        """``1 - sin(pi t / 2)`` as ``2 sin^2(pi (1 - t) / 4)``."""
        return 2 * torch.sin(_HALF_PI / 2 * (1 - time)) ** 2

    def inverse(self, kappa: Tensor) -> Tensor:
        """``(2 / pi) arcsin kappa``."""
        return torch.asin(kappa) / _HALF_PI

    def jump_rate(self, time: Tensor) -> Tensor:
        """``(pi / 2) cot(pi (1 - t) / 4)``."""
        return _HALF_PI / torch.tan(_HALF_PI / 2 * (1 - time))

    def reverse_rate(self, time: Tensor) -> Tensor:
        """``(pi / 2) cot(pi t / 2)``."""
        return _HALF_PI * _tan_half_pi(1 - time)


@SCHEDULES.register
class LogLinearSchedule(Schedule):
    """``kappa_t = 1 - (1 - eps) (1 - t)``: the log-linear noise of MDLM and SEDD, a linear mask probability below 1.

    Their total noise is ``sigma = -log(1 - (1 - eps) s)`` at noise time ``s = 1 - t``, and a token is kept with
    probability ``kappa = exp(-sigma)``. Here ``kappa_0 = eps`` and not 0: a sampler that starts from pure noise is off
    by that much. The jump rate is ``1 / (1 - t)`` for every eps, 1 at t = 0; eps = 0 is the linear schedule.
    """

    name: Literal["log_linear"] = "log_linear"
    eps: float = Field(default=1e-3, ge=0, lt=1)
    """The share of tokens that are data at t = 0; 1e-3 as in SEDD and MDLM."""

    def value(self, time: Tensor) -> Tensor:
        """``eps + (1 - eps) t``."""
        return self.eps + (1 - self.eps) * time

    def derivative(self, time: Tensor) -> Tensor:
        """``1 - eps``."""
        return torch.full_like(time, 1 - self.eps)

    def remaining(self, time: Tensor) -> Tensor:
        """``(1 - eps) (1 - t)``, the mask probability."""
        return (1 - self.eps) * (1 - time)

    def inverse(self, kappa: Tensor) -> Tensor:
        """``(kappa - eps) / (1 - eps)``; 0 for ``kappa < eps``, which no time has."""
        return ((kappa - self.eps) / (1 - self.eps)).clamp(min=0)

    def jump_rate(self, time: Tensor) -> Tensor:
        """``1 / (1 - t)``."""
        return 1 / (1 - time)


@SCHEDULES.register
class KineticOptimalSchedule(Schedule):
    """``kappa_t = sin^2(pi t / 2)``, of least kinetic energy for the mask source; jump rate ``pi tan(pi t / 2)``, 0 at t = 0.

    The square roots of the probabilities move on a great circle at constant speed (Shaul et al. 2025, arXiv 2412.03487).
    For a source that gives the clean tokens a probability ``source_kinetic_optimal`` does the same.
    """

    name: Literal["kinetic_optimal"] = "kinetic_optimal"

    def value(self, time: Tensor) -> Tensor:
        """``sin^2(pi t / 2)``."""
        return torch.sin(_HALF_PI * time) ** 2

    def derivative(self, time: Tensor) -> Tensor:
        """``pi sin(pi t / 2) cos(pi t / 2)``."""
        return math.pi * torch.sin(_HALF_PI * time) * torch.sin(_HALF_PI * (1 - time))

    def remaining(self, time: Tensor) -> Tensor:
        """``cos^2(pi t / 2)`` as ``sin^2(pi (1 - t) / 2)``."""
        return torch.sin(_HALF_PI * (1 - time)) ** 2

    def inverse(self, kappa: Tensor) -> Tensor:
        """``(2 / pi) arcsin sqrt(kappa)``."""
        return torch.asin(torch.sqrt(kappa)) / _HALF_PI

    def jump_rate(self, time: Tensor) -> Tensor:
        """``pi tan(pi t / 2)``."""
        return math.pi * _tan_half_pi(time)

    def reverse_rate(self, time: Tensor) -> Tensor:
        """``pi cot(pi t / 2)``."""
        return math.pi * _tan_half_pi(1 - time)


def _tan_half_pi(time: Tensor) -> Tensor:
    """``tan(pi t / 2)``, exactly 0 at t = 0 and infinite at t = 1."""
    return torch.sin(_HALF_PI * time) / torch.sin(_HALF_PI * (1 - time))
