"""Schedules of a mixture path that may depend on the clean token, and the rates they give to the likelihood bound.

``X`` is any shape; times broadcast against the tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from raydist.config.base import StrictModel
from raydist.config.registries import SCHEDULES
from raydist.core.terms import TokenRates
from raydist.paths.on_device import OnDevice
from raydist.paths.schedules import Schedule, reveal_probability

_SMALLEST_ANGLE = 1e-4


class TokenSchedule(ABC):
    """``kappa_t(x1)`` and its rates, for given clean tokens x1; see :class:`raydist.paths.schedules.Schedule`."""

    fastest_forward: int
    """A token whose jump rate is at no time below any other's."""
    fastest_backward: int
    """A token whose reverse rate is at no time below any other's."""

    @abstractmethod
    def value(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``kappa_t(x1)``."""

    @abstractmethod
    def remaining(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``1 - kappa_t(x1)``."""

    @abstractmethod
    def jump_rate(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``lambda_t(x1) = kappa' / (1 - kappa)``."""

    @abstractmethod
    def reverse_rate(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``kappa' / kappa``."""

    def jump_probability(self, start_X: Tensor, stop_X: Tensor, clean_X: Tensor) -> Tensor:
        """The probability that noise at ``start`` is data at ``stop``."""
        return reveal_probability(self.remaining(start_X, clean_X), self.remaining(stop_X, clean_X))

    @property
    @abstractmethod
    def rates(self) -> TokenRates:
        """``lambda_t`` of every token."""


class SharedSchedule(TokenSchedule):
    """The same schedule for every token."""

    fastest_forward = 0
    fastest_backward = 0

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def value(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``kappa_t``."""
        return self._schedule.value(time_X)

    def remaining(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``1 - kappa_t``."""
        return self._schedule.remaining(time_X)

    def jump_rate(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``kappa' / (1 - kappa)``."""
        return self._schedule.jump_rate(time_X)

    def reverse_rate(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``kappa' / kappa``."""
        return self._schedule.reverse_rate(time_X)

    @property
    def rates(self) -> SharedRates:
        """One rate for all tokens."""
        return SharedRates(self._schedule)


class GreatCircle(TokenSchedule):
    """The schedule of least kinetic energy for a source law p: the roots of the probabilities move on a great circle.

    With ``Omega = arccos sqrt(p(x1))`` and ``s = 1 - t``::

        1 - kappa_t(x1) = sin^2(s Omega) / sin^2(Omega)
        kappa_t(x1) = sin((2 - t) Omega) sin(t Omega) / sin^2(Omega)
        kappa_t'(x1) = Omega sin(2 s Omega) / sin^2(Omega)
        lambda_t(x1) = 2 Omega cot(s Omega)

    The squared speed ``sum_x p_t'(x)^2 / p_t(x)`` is ``4 Omega^2`` at every time. A token that the source never draws has
    Omega = pi / 2 and ``kappa = sin^2(pi t / 2)``. Rates at t = 0: ``lambda = 2 Omega cot Omega``, reverse infinite; at
    t = 1 lambda is infinite. Shaul et al. 2025, arXiv 2412.03487.

    Args:
        source_V: probabilities p. For ``p(x1) = 1`` the limit ``kappa = 1 - (1 - t)^2`` holds to 1e-8.
        never_clean: the mask id, which no data holds; it gets another token's angle.
    """

    def __init__(self, source_V: Tensor, *, never_clean: int | None) -> None:
        angles_V = torch.acos(source_V.double().clamp(0, 1).sqrt()).clamp(min=_SMALLEST_ANGLE)
        if never_clean is not None:
            angles_V[never_clean] = angles_V[0 if never_clean else -1]
        self._angles = OnDevice(angles_V)
        self.fastest_forward = int(angles_V.argmin())
        self.fastest_backward = int(angles_V.argmax())

    def value(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``kappa_t(x1)``."""
        angle_X = self._angle(time_X, clean_X)
        return torch.sin((2 - time_X) * angle_X) * torch.sin(time_X * angle_X) / torch.sin(angle_X) ** 2

    def remaining(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``1 - kappa_t(x1)``."""
        angle_X = self._angle(time_X, clean_X)
        return (torch.sin((1 - time_X) * angle_X) / torch.sin(angle_X)) ** 2

    def jump_rate(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``2 Omega cot((1 - t) Omega)``."""
        return _cotangent_rate(self._angle(time_X, clean_X), time_X)

    def reverse_rate(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        """``Omega sin(2 s Omega) / (sin((2 - t) Omega) sin(t Omega))``; infinite at t = 0."""
        angle_X = self._angle(time_X, clean_X)
        above_X = angle_X * torch.sin(2 * (1 - time_X) * angle_X)
        return above_X / (torch.sin((2 - time_X) * angle_X) * torch.sin(time_X * angle_X))

    @property
    def rates(self) -> GreatCircleRates:
        """One rate for each token, or one for all where the source is flat."""
        angles_V = self._angles(torch.device("cpu"))
        return GreatCircleRates(angles_V[:1] if bool((angles_V == angles_V[0]).all()) else angles_V)

    def _angle(self, time_X: Tensor, clean_X: Tensor) -> Tensor:
        dtype = time_X.dtype if time_X.dtype.is_floating_point else torch.float32
        return self._angles(clean_X.device)[clean_X].to(dtype)


def _cotangent_rate(angle: Tensor, time: Tensor) -> Tensor:
    """``2 Omega cot((1 - t) Omega)``, exactly ``pi tan(pi t / 2)`` for a right angle."""
    rest = (1 - time) * angle
    right = math.pi * torch.sin(time * angle) / torch.sin(rest)
    return torch.where(angle >= math.pi / 2, right, 2 * angle * torch.cos(rest) / torch.sin(rest))


class SharedRates:
    """Jump rates that are the same for all tokens."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def at(self, time_C: Tensor) -> Tensor:
        """``lambda_t``, ``[C, 1]``."""
        return self._schedule.jump_rate(time_C)[:, None]

    def to(self, device: torch.device) -> SharedRates:
        """Itself: it holds no tensor."""
        return self


class GreatCircleRates:
    """Jump rates of :class:`GreatCircle`."""

    def __init__(self, angles_V: Tensor) -> None:
        self._angles_V = angles_V

    def at(self, time_C: Tensor) -> Tensor:
        """``lambda_t(y)``, ``[C, V]`` or ``[C, 1]``."""
        return _cotangent_rate(self._angles_V.to(time_C.dtype)[None, :], time_C[:, None])

    def to(self, device: torch.device) -> GreatCircleRates:
        """The same rates with their angles on a device."""
        return GreatCircleRates(self._angles_V.to(device))


@SCHEDULES.register
class SourceKineticOptimal(StrictModel):
    """The schedule of least kinetic energy for the path's own source; it depends on the clean token.

    For a mixture path with a uniform or given source; with the mask source it is ``kinetic_optimal``. It is no
    :class:`raydist.paths.schedules.Schedule`: there is no ``kappa_t`` without a token.
    """

    name: Literal["source_kinetic_optimal"] = "source_kinetic_optimal"
