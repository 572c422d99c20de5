"""The values that a key of a sweep may take: lists and ranges."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Field

from raydist.config.base import StrictModel, nearest_hint, validated
from raydist.core.errors import ConfigError


class Suggester(Protocol):
    """The part of ``optuna.Trial`` that a distribution asks."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """An integer of ``[low, high]``."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number of ``[low, high]``."""

    def suggest_categorical(self, name: str, choices: Sequence[int]) -> int:
        """One of the choices."""


class Distribution(StrictModel, ABC):
    """The values that a key may take."""

    when: dict[str, Any] = Field(default_factory=dict)
    """A trial has the key only if these keys of its recipe have these values, or one of them where a list is given."""

    @abstractmethod
    def at(self, uniform: float) -> Any:
        """The value at a uniform draw of ``[0, 1)``, by inverse transform."""

    @abstractmethod
    def suggest(self, key: str, trial: Suggester) -> Any:
        """The value that a searcher proposes."""

    @property
    @abstractmethod
    def corners(self) -> list[Any]:
        """The values that must fit for all of them to fit: both ends of a range, or every value of a list."""


class Choice(Distribution):
    """One of a list; a value may be a mapping, such as a whole path with its source."""

    choice: list[Any] = Field(min_length=1)

    def at(self, uniform: float) -> Any:
        """Each value with the same probability."""
        return self.choice[int(uniform * len(self.choice))]

    def suggest(self, key: str, trial: Suggester) -> Any:
        """By its number, because searchers know no mappings."""
        return self.choice[trial.suggest_categorical(key, range(len(self.choice)))]

    @property
    def corners(self) -> list[Any]:
        """All values."""
        return list(self.choice)


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
        raise ValueError(f"[low, high] with low < high, not {list(ends)}")
    return ends


def _positive(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] <= 0:
        raise ValueError(f"a logarithm needs low > 0, not {ends[0]:g}")
    return ends


class Uniform(Distribution):
    """Uniform on ``[low, high)``."""

    uniform: Annotated[tuple[float, float], AfterValidator(_ascending)]

    def at(self, uniform: float) -> float:
        """``low + u (high - low)``."""
        low, high = self.uniform
        return low + uniform * (high - low)

    def suggest(self, key: str, trial: Suggester) -> float:
        """A number of the range."""
        return trial.suggest_float(key, *self.uniform)

    @property
    def corners(self) -> list[Any]:
        """Both ends."""
        return list(self.uniform)


class LogUniform(Distribution):
    """A number whose logarithm is uniform on ``[log low, log high)``."""

    log_uniform: Annotated[tuple[float, float], AfterValidator(_ascending), AfterValidator(_positive)]

    def at(self, uniform: float) -> float:
        """``low (high / low)^u``."""
        low, high = self.log_uniform
        return float(low * (high / low) ** uniform)

    def suggest(self, key: str, trial: Suggester) -> float:
        """A number of the range, searched on the logarithm."""
        return trial.suggest_float(key, *self.log_uniform, log=True)

    @property
    def corners(self) -> list[Any]:
        """Both ends."""
        return list(self.log_uniform)


class Integer(Distribution):
    """Uniform on the integers from low to high, both included."""

    integer: Annotated[tuple[int, int], AfterValidator(_ascending)]

    def at(self, uniform: float) -> int:
        """``low + floor(u (high - low + 1))``."""
        low, high = self.integer
        return low + int(uniform * (high - low + 1))

    def suggest(self, key: str, trial: Suggester) -> int:
        """An integer of the range."""
        return trial.suggest_int(key, *self.integer)

    @property
    def corners(self) -> list[Any]:
        """Both ends."""
        return list(self.integer)


KINDS: dict[str, type[Distribution]] = {
    "choice": Choice,
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "integer": Integer,
}
"""As they are written in a sweep file."""


def parse_distribution(value: Any, *, where: str) -> Distribution:
    """``{log_uniform: [1.0e-4, 1.0e-2], when: {...}}``, or a list of values, which is a choice; ``grid`` says the same.

    Raises:
        ConfigError: no such distribution, a range the wrong way round, an empty list, or a value that is there twice.
    """
    if isinstance(value, Distribution):
        return value
    if isinstance(value, list):
        value = {"choice": value}
    if isinstance(value, dict) and "grid" in value:
        value = {("choice" if name == "grid" else name): item for name, item in value.items()}
    names = [name for name in value if name != "when"] if isinstance(value, dict) else []
    if len(names) != 1 or names[0] not in KINDS:
        raise ConfigError(
            "not a distribution",
            where=where,
            found=json.dumps(value, default=str)[:200],
            expected="a list of values, or one of " + ", ".join([*KINDS, "grid"]),
            fix=nearest_hint(names[0], KINDS) if names else f"{where}: [{value}]",
        )
    distribution = validated(KINDS[names[0]], value, prefix=where)
    words = [json.dumps(corner, sort_keys=True) for corner in distribution.corners]
    if len(set(words)) < len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise ConfigError("a value is there twice", where=where, found=twice, fix="remove one of them")
    return distribution
