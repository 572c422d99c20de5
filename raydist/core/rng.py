"""Noise that is a function of the data row, never of the rank.

Every draw is ``philox(key(seed, purpose), counter(epoch, row, position))``: the same seed and the same data give the same
noise at any world size, any microbatch size, on CPU and on CUDA, before and after a restart. There is no generator state.

Philox-4x32-10 is from Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". It is written in int64 torch
operations whose every intermediate is an exact integer, so the bits agree on every device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MUL0, _MUL1 = 0xD2511F53, 0xCD9E8D57
_WEYL0, _WEYL1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def _mulhilo(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of ``factor * x`` for 32-bit operands held in int64.

    The 64-bit product may wrap in int64; its bits are still right, so a shift and a mask (to undo the sign extension of
    the arithmetic shift) recover both words.
    """
    product = x * factor
    return (product >> 32) & _MASK32, product & _MASK32


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (held in int64, broadcast shape) of Philox-4x32-10.

    Args:
        counter: four int64 tensors of 32-bit words, broadcastable against each other.
        key: two 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _mulhilo(_MUL0, c0)
        high1, low1 = _mulhilo(_MUL1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL0) & _MASK32, (k1 + _WEYL1) & _MASK32
    return c0, c1, c2, c3


def stream_key(seed: int, purpose: str) -> tuple[int, int]:
    """Two 32-bit key words for one purpose (``"mask"``, ``"time"``, ...) of one seed."""
    digest = hashlib.blake2b(f"{seed}\x00{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _words(value: Tensor) -> tuple[Tensor, Tensor]:
    return value & _MASK32, (value >> 32) & _MASK32


@dataclass(frozen=True)
class RowRng:
    """The noise source of one batch of rows.

    Attributes:
        seed: the run's noise seed.
        step: the optimizer step the rows belong to; only ``step_integer`` reads it.
        epochs_B: how often each row was seen before, int64 ``[B]``.
        rows_B: the global id of each row, int64 ``[B]``; unique over all datasets of a mixture.
        samples_B: the row's number in the whole run, int64 ``[B]``, consecutive inside a step; None where there is no run.
            For draws that shall be spread evenly over a step's rows; never a key of independent draws.
    """

    seed: int
    step: int
    epochs_B: Tensor
    rows_B: Tensor
    samples_B: Tensor | None = None

    def words(self, purpose: str, num_positions: int) -> tuple[Tensor, Tensor]:
        """Two independent 32-bit words per (row, position), each int64 ``[B, num_positions]``."""
        positions_1L = torch.arange(num_positions, dtype=torch.int64, device=self.rows_B.device)[None, :]
        rows_low, rows_high = _words(self.rows_B[:, None])
        epochs = self.epochs_B[:, None] & _MASK32
        word0, word1, _, _ = philox_4x32((positions_1L, rows_low, rows_high, epochs), stream_key(self.seed, purpose))
        return word0, word1

    def uniform(self, purpose: str, num_positions: int) -> Tensor:
        """Uniform draws in [0, 1), float32 ``[B, num_positions]``, multiples of 2**-24."""
        word, _ = self.words(purpose, num_positions)
        return (word >> 8).to(torch.float32) * 2.0**-24

    def step_integer(self, purpose: str, *, low: int, high: int) -> int:
        """One integer in [low, high] that every row of the step shares, whatever the rank or microbatch.

        A plain Python number, so that shapes and masks may depend on it without a device synchronisation. Uses the
        fixed-point product of a 32-bit word with the range, whose bias is below ``range / 2**32``.
        """
        zero = torch.zeros((), dtype=torch.int64)
        step_low, step_high = _words(torch.tensor(self.step, dtype=torch.int64))
        word, *_ = philox_4x32((step_low, step_high, zero, zero), stream_key(self.seed, "step/" + purpose))
        return low + ((int(word) * (high - low + 1)) >> 32)

    def narrow(self, start: int, stop: int) -> RowRng:
        """The same source for rows ``[start, stop)`` of the batch."""
        samples_B = None if self.samples_B is None else self.samples_B[start:stop]
        return RowRng(self.seed, self.step, self.epochs_B[start:stop], self.rows_B[start:stop], samples_B)
