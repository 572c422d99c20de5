"""Which positions of a row are data from the start, so that the model learns to complete a condition."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.registries import COUPLINGS
from raydist.core.rng import RowRng
from raydist.paths.base import Coupling


@COUPLINGS.register
class IndependentCoupling(Coupling):
    """Nothing is given: source and data are independent (the U-coupling of Gat et al. 2024, arXiv 2407.15595)."""

    name: Literal["independent"] = "independent"

    def given(self, clean_BL: Tensor, rng: RowRng) -> Tensor:
        """False everywhere."""
        return torch.zeros_like(clean_BL, dtype=torch.bool)


class _ConditionalCoupling(Coupling):
    unconditional_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability that nothing is given in a row, so that all of it is noised and carries loss."""

    def _conditional(self, rng: RowRng) -> Tensor:
        """Rows that keep their condition, bool ``[B, 1]``."""
        return rng.uniform("coupling/unconditional", 1) >= self.unconditional_probability


@COUPLINGS.register
class PrefixCoupling(_ConditionalCoupling):
    """A prefix of ``floor(N u^power)`` of the N tokens is given, u uniform per row (the C-coupling of Gat et al. 2024).

    The last token is never given, so that every row has something to generate.
    """

    name: Literal["prefix"] = "prefix"
    power: float = Field(default=1.0, gt=0)
    """1: all lengths alike, as Gat et al.; 3: mostly short, as Edit Flows (Havasi et al. 2025, arXiv 2506.09018)."""

    def given(self, clean_BL: Tensor, rng: RowRng) -> Tensor:
        """True in the prefix."""
        length = clean_BL.shape[1]
        lengths_B1 = (rng.uniform("coupling/prefix", 1) ** self.power * length).long()
        positions_1L = torch.arange(length, device=clean_BL.device)[None, :]
        return (positions_1L < lengths_B1.clamp(max=length - 1)) & self._conditional(rng)


@COUPLINGS.register
class PositionsCoupling(_ConditionalCoupling):
    """Each position is given with a probability that is drawn per row, uniform on ``[0, max_share)``."""

    name: Literal["positions"] = "positions"
    max_share: float = Field(default=1.0, gt=0, le=1)
    """Upper end of the row's probability."""

    def given(self, clean_BL: Tensor, rng: RowRng) -> Tensor:
        """True where given."""
        shares_B1 = rng.uniform("coupling/share", 1) * self.max_share
        return (rng.uniform("coupling/positions", clean_BL.shape[1]) < shares_B1) & self._conditional(rng)
