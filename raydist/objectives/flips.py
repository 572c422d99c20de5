"""Which columns of an alignment have turned from x0 to x1 at time t: one by one, or in spreading groups.

Source of the spreading: Havasi et al. 2025, "Edit Flows: Flow Matching with Edit Operations", arXiv 2506.09018, appendix C.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raydist.paths.schedules import Schedule


def independent_flips(uniforms_SN: Tensor, *, kappa_S1: Tensor) -> Tensor:
    """Each column flipped by itself with probability ``kappa_t``, bool ``[S, N]``."""
    return 1 - uniforms_SN <= kappa_S1


@dataclass(frozen=True)
class LocalisedFlips:
    """Flips that spread to their neighbours.

    Attributes:
        flipped_SN: ``m_t``, bool.
        neighbours_SN: how many origins reach a neighbour of a column that is not flipped; 0 where it is.
    """

    flipped_SN: Tensor
    neighbours_SN: Tensor


def localised_flips(
    uniforms_SN3: Tensor, *, time_S1: Tensor, schedule: Schedule, spread_rate: float, origins_SN: Tensor
) -> LocalisedFlips:
    """Draws ``m_t`` without simulation (appendix C.1).

    Column i flips by itself at the time ``t*`` with ``1 - kappa(t*) = u``; from then on its flip spreads to the left and to the
    right, each at the constant rate ``spread_rate``, so that at time t it reaches ``Poisson(spread_rate (t - t*))`` columns on
    either side. Intervals are counted by differences at their ends, so the cost is linear in N.

    Args:
        uniforms_SN3: uniforms for the time, the reach to the left and the reach to the right.
        time_S1: t.
        schedule: kappa.
        spread_rate: lambda_prop, per unit of time.
        origins_SN: columns that may flip by themselves; the others pass flips on.
    """
    num_columns = uniforms_SN3.shape[1]
    born_SN = schedule.inverse(1 - uniforms_SN3[..., 0])
    active_SN = origins_SN & independent_flips(uniforms_SN3[..., 0], kappa_S1=schedule.value(time_S1))
    mean_SN = spread_rate * (time_S1 - born_SN).clamp(min=0)
    index_N = torch.arange(num_columns)
    left_SN = (index_N - poisson(uniforms_SN3[..., 1], mean=mean_SN, most=num_columns)).clamp(min=0)
    right_SN = (index_N + poisson(uniforms_SN3[..., 2], mean=mean_SN, most=num_columns)).clamp(max=num_columns - 1)
    ends_SN = torch.zeros(len(active_SN), num_columns + 1, dtype=torch.int64)
    ends_SN.scatter_add_(1, left_SN, active_SN.long()).scatter_add_(1, right_SN + 1, -active_SN.long())
    cover_SN = ends_SN.cumsum(dim=1)[:, :-1]
    beside_SN = torch.zeros_like(cover_SN)
    beside_SN[:, 1:] += cover_SN[:, :-1]
    beside_SN[:, :-1] += cover_SN[:, 1:]
    flipped_SN = cover_SN > 0
    return LocalisedFlips(flipped_SN, beside_SN.masked_fill(flipped_SN, 0))


def poisson(uniforms: Tensor, *, mean: Tensor, most: int) -> Tensor:
    """Poisson numbers by inversion of the distribution function, cut off at ``most``; int64, float64 inside."""
    mean = mean.double()
    probability = torch.exp(-mean)
    cumulative, number = probability.clone(), torch.zeros_like(mean, dtype=torch.int64)
    for k in range(1, most + 1):
        beyond = uniforms >= cumulative
        if not bool(beyond.any()):
            break
        number += beyond
        probability = probability * mean / k
        cumulative = cumulative + probability
    return number
