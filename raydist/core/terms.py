"""What an objective asks of the heads, and what it gets back.

The vocabulary-sized logits exist only inside a head, one chunk at a time; objectives speak of positions and targets. Every
term is a sum over positions, ``sum_t weights[t] * cost_t``; the classes differ in the cost.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadTerm(ABC):
    """The base of all terms.

    Attributes:
        name: names the term in metrics (``"ntp"``, ``"matp"``).
        positions_T: index into the hidden states flattened to ``[B * L, D]``, int64 ``[T]``; only positions that carry loss.
        weights_T: float32 ``[T]``, or None for all ones.
        head: the name of the model's head that is read.
        denominator: the name of the global count that the sum is divided by (see ``NoisedBatch.counts``).
    """

    name: str
    positions_T: Tensor
    weights_T: Tensor | None = None
    head: str = "lm"
    denominator: str = "targets"

    def to(self, device: torch.device) -> Self:
        """The term with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        others = {
            name: value.to(device) for name, value in values.items() if name not in moved and hasattr(value, "to")
        }
        return replace(self, **moved, **others)


@dataclass(frozen=True, kw_only=True)
class CrossEntropyTerm(HeadTerm):
    """``cost_t = -log softmax(logits_t)[targets[t]]``.

    Attributes:
        targets_T: target token ids, int64 ``[T]``.
    """

    targets_T: Tensor


class TokenRates(Protocol):
    """Jump rates ``lambda_t(y)`` to every token y of a mixture path (:mod:`raydist.paths`)."""

    def at(self, time_C: Tensor) -> Tensor:
        """Rates at some times, ``[C, V]``, or ``[C, 1]`` where they are the same for all tokens."""

    def to(self, device: torch.device) -> TokenRates:
        """The same rates with their tensors on a device."""


@dataclass(frozen=True, kw_only=True)
class ElboTerm(HeadTerm):
    """The integrand of the negative evidence lower bound of a mixture path, a generalised Kullback-Leibler divergence.

    With ``P = softmax(logits_t)``, current token x, clean token y and ``lambda`` the rates at ``times[t]``::

        cost_t = sum_v lambda(v) P[v] - lambda(x) P[x] - 1[x != y] lambda(y) (1 + log P[y])

    Shaul et al. 2025, arXiv 2412.03487; for rates equal for all tokens it is
    ``lambda (1[x = y] - P[x] - 1[x != y] log P[y])``.

    Attributes:
        targets_T: clean tokens y, int64 ``[T]``.
        current_T: tokens x of the noised sequence, int64 ``[T]``.
        times_T: float32 ``[T]``.
        rates: the path's jump rates.
    """

    targets_T: Tensor
    current_T: Tensor
    times_T: Tensor
    rates: TokenRates


class TokenTransitions(Protocol):
    """Rates ``u_t(y, x | x1)`` of any path (:mod:`raydist.paths`), for all clean tokens x1 at once: V^2 of them."""

    @property
    def vocab_size(self) -> int:
        """V."""

    def tables(self, time: Tensor, *, current_G: Tensor) -> Iterator[Tensor]:
        """For each current token x a table ``[V, V]``, x1 down and y across, with 0 where y is x.

        Args:
            time: a scalar in the dtype that the rates shall have.
            current_G: tokens x.
        """


@dataclass(frozen=True, kw_only=True)
class PathElboTerm(HeadTerm):
    """The integrand of the negative evidence lower bound of any path with a velocity.

    With ``P = softmax(logits_t)``, current token x, clean token y1, the path's rates ``u(y) = u_t(y, x | y1)`` and those
    of the model ``v(y) = sum_x1 P[x1] u_t(y, x | x1)``::

        cost_t = sum_{y != x} v(y) - u(y) + u(y) log(u(y) / v(y))

    Shaul et al. 2025, arXiv 2412.03487; for mixture paths it is :class:`ElboTerm`, whose cost is linear in V where this
    one's is quadratic.

    Attributes:
        targets_T: clean tokens y1, int64 ``[T]``.
        current_T: tokens x of the noised sequence, int64 ``[T]``.
        times_T: float32 ``[T]``; few different ones, because positions that share time and token share the work.
        transitions: of the path.
    """

    targets_T: Tensor
    current_T: Tensor
    times_T: Tensor
    transitions: TokenTransitions


@dataclass(frozen=True, kw_only=True)
class PoissonTerm(HeadTerm):
    """The negative log-likelihood of event counts under log-rates o that a narrow head of K outputs gives::

        cost_t = sum_k exposure[t, k] exp(o[t, k]) - counts[t, k] o[t, k]

    Attributes:
        exposure_TK: float32 ``[T, K]``; 0 where an event cannot happen.
        counts_TK: float32 ``[T, K]``; weighted counts of the events that the target asks for.
    """

    exposure_TK: Tensor
    counts_TK: Tensor


@dataclass(frozen=True)
class TermResult:
    """A term's value.

    Attributes:
        term: what was asked.
        loss_sum: the weighted sum, a float32 scalar that carries the gradient.
        losses_T: each position's cost before weighting, float32 ``[T]``, detached.
    """

    term: HeadTerm
    loss_sum: Tensor
    losses_T: Tensor
