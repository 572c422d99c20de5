"""At which time each row, or each block of a row, is corrupted.

Times spread evenly over the rows of an optimizer step lower the variance of the loss. A step's rows are consecutive samples
of the run, so the evenness is built on the sample's number: neither the rank nor the microbatch enters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raydist.config.base import StrictModel
from raydist.core.rng import RowRng
from raydist.paths.schedules import Schedule

_MASK32 = 0xFFFFFFFF
_GOLDEN_32 = 0x9E3779B9  # 2**32 times the golden ratio's fraction, 0.618
_SQRT2_32 = 0x6A09E667  # 2**32 times the fraction of the square root of 2, 0.414

_LARGEST_REST = 0.0101


class TimeSampling(StrictModel):
    """Draws times, uniform between low and high for each row by itself; the kinds differ in how rows depend on each other.

    Neither end is ever drawn: rates are infinite at t = 1, and those of some schedules at t = 0.

    With n the sample's number (``RowRng.samples_B``, or the row id where there is none):

    - ``uniform``: independent.
    - ``antithetic``: samples 2k and 2k + 1 get u and 1 - u.
    - ``stratified``: ``frac(U + n * 0.618...)`` with U drawn once a step, a Kronecker sequence: any m consecutive samples,
      so also those of one microbatch, leave no gap above about 2.6 / m. Blocks k of a row add ``k * 0.414...``.
    """

    kind: Literal["uniform", "antithetic", "stratified"] = "stratified"
    """How the times of different rows depend on each other; our choice of the default."""
    low: float = Field(default=0.0, ge=0, lt=1)
    """The earliest time."""
    high: float = Field(default=0.999, gt=0, le=1)
    """Above the latest time; below 1 because jump rates are infinite there."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> TimeSampling:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")
        return self

    def per_row(self, rng: RowRng, *, purpose: str = "time") -> Tensor:
        """One time per row, float32 ``[B, 1]``."""
        return self._clipped(self._uniforms(rng, purpose=purpose, num_blocks=1))

    def per_block(self, rng: RowRng, *, length: int, block_size: int, purpose: str = "time") -> Tensor:
        """One time per block of ``block_size`` positions, spread over its positions, float32 ``[B, length]``."""
        num_blocks = -(-length // block_size)
        times_BK = self._clipped(self._uniforms(rng, purpose=purpose, num_blocks=num_blocks))
        return times_BK.repeat_interleave(block_size, dim=1)[:, :length].contiguous()

    def covers(self, schedule: Schedule | None) -> bool:
        """Whether so much of all noise levels is drawn that the mean over the range is the mean over [0, 1], to about 1%.

        Args:
            schedule: of the path; None where it is not the same for all tokens, which then counts as linear.
        """
        return self.covers_all_but(
            1.0 - self.high if schedule is None else float(schedule.remaining(torch.tensor(self.high)))
        )

    def covers_all_but(self, remaining: float) -> bool:
        """The same, for the share of tokens that are noise at the latest time."""
        return self.low == 0.0 and remaining <= _LARGEST_REST

    def _clipped(self, uniforms: Tensor) -> Tensor:
        times = self.low + (self.high - self.low) * uniforms.clamp(min=2.0**-25)
        return times.clamp(max=torch.nextafter(times.new_tensor(self.high), times.new_tensor(0.0)))

    def _uniforms(self, rng: RowRng, *, purpose: str, num_blocks: int) -> Tensor:
        if self.kind == "uniform":
            return rng.uniform(purpose, num_blocks)
        if self.kind == "antithetic":
            return _antithetic(rng, purpose, num_blocks)
        return _kronecker(rng, purpose, num_blocks)


def _antithetic(rng: RowRng, purpose: str, num_blocks: int) -> Tensor:
    """``[B, K]``; the two of a pair share their draw and one of them mirrors it inside [0, 1)."""
    if rng.samples_B is None:
        numbers_B, counters_B = rng.rows_B, rng.epochs_B
    else:
        numbers_B, counters_B = rng.samples_B, torch.full_like(rng.epochs_B, rng.step)
    pairs = replace(rng, epochs_B=counters_B, rows_B=numbers_B >> 1)
    uniforms_BK = pairs.uniform(purpose + "/pairs", num_blocks)
    return torch.where((numbers_B & 1).bool()[:, None], (1 - 2.0**-24) - uniforms_BK, uniforms_BK)


def _kronecker(rng: RowRng, purpose: str, num_blocks: int) -> Tensor:
    """``[B, K]`` in exact 32-bit integers, so that every device gives the same bits."""
    numbers_B1 = (rng.rows_B if rng.samples_B is None else rng.samples_B)[:, None] & _MASK32
    blocks_1K = torch.arange(num_blocks, dtype=torch.int64, device=rng.rows_B.device)[None, :]
    offset = rng.step_integer(purpose, low=0, high=_MASK32)
    word_BK = (offset + numbers_B1 * _GOLDEN_32 + blocks_1K * _SQRT2_32) & _MASK32
    return (word_BK >> 8).to(torch.float32) * 2.0**-24
