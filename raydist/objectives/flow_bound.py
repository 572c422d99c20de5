"""The likelihood bound of Discrete Flow Matching as a head term, and for which paths there is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raydist.core.terms import CrossEntropyTerm, ElboTerm, HeadTerm, PathElboTerm
from raydist.paths.base import Path, PathConfig
from raydist.paths.kinetic import KineticPath
from raydist.paths.schedules import Schedule
from raydist.paths.time import TimeSampling

MAX_TABLE_TOKENS = 1024
"""The largest vocabulary for which rates between all pairs of tokens are worked out."""


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """Knows the tokens of its batch that are not given, an int64 scalar: not all of them carry loss."""

    num_targets: Tensor


@dataclass(frozen=True, kw_only=True)
class CrossEntropyPerToken(PerToken, CrossEntropyTerm):
    """A cross entropy that may be a bound."""


@dataclass(frozen=True, kw_only=True)
class _ElboPerToken(PerToken, ElboTerm):
    """The bound of a mixture path."""


@dataclass(frozen=True, kw_only=True)
class _PathElboPerToken(PerToken, PathElboTerm):
    """The bound of any other path."""


def has_bound(path: Path) -> bool:
    """Whether the bound can be evaluated: for mixtures always, for other paths over small vocabularies."""
    return path.rates is not None or (path.transitions is not None and path.vocab_size <= MAX_TABLE_TOKENS)


def bound_term(
    path: Path,
    *,
    positions_T: Tensor,
    targets_T: Tensor,
    current_T: Tensor,
    times_T: Tensor,
    num_targets: Tensor,
    weights_T: Tensor | None = None,
) -> HeadTerm:
    """The integrand of the bound at some positions, a term of the name ``elbo``.

    Args:
        path: one that :func:`has_bound`.
        positions_T: where.
        targets_T: clean tokens.
        current_T: tokens of the noised row.
        times_T: float32.
        num_targets: tokens of the batch that are not given.
        weights_T: see :class:`raydist.core.terms.HeadTerm`.
    """
    known = {"positions_T": positions_T, "targets_T": targets_T, "current_T": current_T, "times_T": times_T}
    if path.rates is not None:
        return _ElboPerToken(name="elbo", rates=path.rates, num_targets=num_targets, weights_T=weights_T, **known)
    assert path.transitions is not None
    return _PathElboPerToken(
        name="elbo", transitions=path.transitions, num_targets=num_targets, weights_T=weights_T, **known
    )


def covers_path(time: TimeSampling, config: PathConfig, path: Path) -> bool:
    """Whether so many times are drawn that the mean over them is the mean over [0, 1], to about 1%."""
    schedule = getattr(config, "schedule", None)
    if isinstance(schedule, Schedule) or not isinstance(path, KineticPath):
        return time.covers(schedule if isinstance(schedule, Schedule) else None)
    tokens_V = torch.arange(path.vocab_size)
    possible_N = tokens_V[path.source.probability(tokens_V) > 0]
    latest_N = torch.full(possible_N.shape, time.high, dtype=torch.float64)
    data_N1 = path.probabilities(possible_N, latest_N).gather(1, possible_N[:, None])
    return time.covers_all_but(float(1 - data_N1.min()))
