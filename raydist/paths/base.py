"""The contract of a discrete probability path.

A path ``p_t(x | x1)`` carries a source law at t = 0 to the clean token ``x1`` at t = 1; positions are independent given the
clean sequence. Its velocity ``u_t(v, z | x1)`` is the rate at which a token z turns into v, so that
``d p_t(v) / dt = sum_z u_t(v, z) p_t(z)`` with ``u_t(z, z) = - sum_{v != z} u_t(v, z)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import StrictModel, choice
from raydist.config.registries import COUPLINGS
from raydist.core.rng import RowRng
from raydist.core.terms import TokenRates, TokenTransitions
from raydist.core.token_ids import TokenIds


@dataclass(frozen=True)
class JumpNoise:
    """Two independent uniforms per token for one step: whether it jumps, and where to. float, any common shape."""

    whether: Tensor
    where: Tensor


class Path(ABC):
    """A conditional probability path over tokens ``0 .. vocab_size - 1``.

    ``X`` stands for any shape; times broadcast against it. Dense methods build ``[X, V]`` and are for oracles and small
    vocabularies; :meth:`corrupt` and :meth:`jump` never build more than one chunk of it.
    """

    vocab_size: int

    def in_context(self, tokens_BL: Tensor, *, given_BL: Tensor) -> Path:
        """The path for rows of which some tokens are given, for a source that depends on them; others return themselves.

        Args:
            tokens_BL: read where given only.
            given_BL: bool ``[B, L]``.
        """
        return self

    @abstractmethod
    def probabilities(self, clean_X: Tensor, time_X: Tensor, *, start_X: Tensor | None = None) -> Tensor:
        """``p_t(. | x1)``, ``[X, V]``; given ``start_X`` conditioned on the source token x0 as well."""

    @abstractmethod
    def velocity(self, clean_X: Tensor, current_X: Tensor, time_X: Tensor) -> Tensor:
        """``u_t(. , current | clean)``, ``[X, V]``, rows sum to 0."""

    def preserving_velocity(self, clean_X: Tensor, current_X: Tensor, time_X: Tensor) -> Tensor:
        """Rates ``[X, V]`` that leave ``p_t(. | x1)`` as it is, so that any ``c_t >= 0`` times them may be added.

        By default those of drawing anew from the path, ``p_t(. | x1) - delta_z``.
        """
        rates_XV = self.probabilities(clean_X, time_X)
        return rates_XV.scatter_add(-1, current_X[..., None], -rates_XV.sum(-1, keepdim=True))

    @abstractmethod
    def draw_start(self, clean_BL: Tensor, *, uniforms_BL: Tensor) -> Tensor:
        """Source tokens x0, int64 ``[B, L]``, by inverse transform of the uniforms; ``clean_BL`` gives the shape."""

    @abstractmethod
    def corrupt(self, clean_BL: Tensor, *, start_BL: Tensor, time_BL: Tensor, uniforms_BL: Tensor) -> Tensor:
        """Draws ``x_t ~ p_t(. | x0, x1)``, int64 ``[B, L]``; a position with ``start = clean`` stays clean."""

    @abstractmethod
    def jump(
        self,
        current_BL: Tensor,
        *,
        clean_BL: Tensor,
        start_time_BL: Tensor,
        stop_time_BL: Tensor,
        corrector_BL: Tensor | None,
        noise: JumpNoise,
    ) -> Tensor:
        """One always-valid step from ``start_time`` to ``stop_time`` given drawn clean tokens, int64 ``[B, L]``.

        A token leaves with probability ``1 - exp(-h sum_{v != z} r(v))`` (or its exact value where the path knows it) for
        ``v ~ r``, with ``r = u_t(., z | x1)`` plus ``corrector`` times the probability-preserving rates of the path.
        At ``stop_time = 1`` the result is ``clean``.

        Args:
            corrector_BL: ``c_t >= 0``, broadcastable; None for 0.
        """

    @property
    def absorbing_id(self) -> int | None:
        """The token that all noise is (the mask), where a token of the path is either it or data; else None."""
        return None

    def may_jump(
        self,
        current_BL: Tensor,
        *,
        start_time_BL: Tensor,
        stop_time_BL: Tensor,
        corrector_BL: Tensor | None,
        noise: JumpNoise,
    ) -> Tensor:
        """Where :meth:`jump` with the same noise could change the token for some clean token, bool ``[B, L]``.

        Known before the clean tokens are, so that a sampler need not ask the model for the others. On a path with an
        absorbing token the clean token of a position that is data by now is that token itself.
        """
        return torch.ones_like(current_BL, dtype=torch.bool)

    @property
    def rates(self) -> TokenRates | None:
        """Jump rates for :class:`raydist.core.terms.ElboTerm`; None where the path is no mixture."""
        return None

    @property
    def transitions(self) -> TokenTransitions | None:
        """Rates for :class:`raydist.core.terms.PathElboTerm`; None where the path has :attr:`rates`."""
        return None


class Coupling(StrictModel, ABC):
    """How x0 and x1 belong together: which positions are data from the start."""

    name: str

    @abstractmethod
    def given(self, clean_BL: Tensor, rng: RowRng) -> Tensor:
        """Positions whose token is the clean one at every time (the condition), bool ``[B, L]``."""


class PathConfig(StrictModel, ABC):
    """The base of a path's configuration; a subclass is registered under its ``name``.

    A field ``schedule`` that is a :class:`raydist.paths.schedules.Schedule` says that the posterior depends on the time
    through ``kappa_t`` alone, so that another schedule may be chosen after training.
    """

    name: str
    coupling: choice(COUPLINGS, Coupling) = Field(default_factory=lambda: COUPLINGS.parse("independent"))  # type: ignore[valid-type]
    """Which positions are data from the start."""

    @abstractmethod
    def build(self, ids: TokenIds) -> Path:
        """The path for a vocabulary.

        Raises:
            ConfigError: the vocabulary lacks a mask id that the source needs, or a file cannot be read.
        """
