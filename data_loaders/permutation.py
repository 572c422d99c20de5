"""Random-access permutations: where index ``i`` of a shuffled range goes, without shuffling the range.

A generalised Feistel network permutes the cells of a table of ``a * b`` integers just larger than the range; results
outside the range are walked through the network again until they fall inside (Black and Rogaway 2002, "Ciphers with
arbitrary finite domains", generalised Feistel and cycle walking). ``a * b - size < a = ceil(sqrt(size))``: walks are rare.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
UIntArray = npt.NDArray[np.uint64]

_NUM_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_SHIFT_A = np.uint64(30)
_SHIFT_B = np.uint64(27)
_HALF = np.uint64(32)


def order_key(seed: int, purpose: str, *numbers: int) -> int:
    """A 64-bit key for one purpose of one seed; different numbers (epoch, dataset, ...) give unrelated keys."""
    text = "\x00".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keyed_permutation(index_N: IntArray, *, size: int, key: int, tweak: IntArray | int = 0) -> IntArray:
    """Images of indices under keyed permutations, int64 ``[N]``.

    Args:
        index_N: int64 ``[N]``, each in ``[0, size)``.
        size: length of the permuted range, at most 2**63.
        key: 64-bit key (see :func:`order_key`).
        tweak: chooses one of a family of unrelated permutations under the key, one for all or one for each index.
    """
    num_high = math.isqrt(size - 1) + 1
    num_low = -(-size // num_high)
    with np.errstate(over="ignore"):
        key_N = _mix(np.asarray(tweak).astype(np.uint64) * _GOLDEN + np.uint64(key))
        result_N = _feistel(index_N.astype(np.uint64), num_high, num_low, key_N)
        outside_M = np.flatnonzero(result_N >= np.uint64(size))
        while outside_M.size:
            key_M = key_N[outside_M] if key_N.ndim else key_N
            walked_M = _feistel(result_N[outside_M], num_high, num_low, key_M)
            result_N[outside_M] = walked_M
            outside_M = outside_M[walked_M >= np.uint64(size)]
    return result_N.astype(np.int64)


def _mix(value: UIntArray) -> UIntArray:
    value = (value ^ (value >> _SHIFT_A)) * _MIX_A
    return (value ^ (value >> _SHIFT_B)) * _MIX_B


def _feistel(value_N: UIntArray, num_high: int, num_low: int, key_N: UIntArray) -> UIntArray:
    """One pass through the network; the key has one element, or one for each value."""
    high_size, low_size = np.uint64(num_high), np.uint64(num_low)
    high_N = value_N // low_size
    low_N = value_N - high_N * low_size
    for _ in range(_NUM_ROUNDS // 2):
        key_N = key_N + _GOLDEN
        high_N = _shift(high_N, low_N + key_N, high_size)
        key_N = key_N + _GOLDEN
        low_N = _shift(low_N, high_N + key_N, low_size)
    return high_N * low_size + low_N


def _shift(value_N: UIntArray, seed_N: UIntArray, size: np.uint64) -> UIntArray:
    """``(value + draw(seed)) % size`` for a draw in ``[0, size)``; where nothing wraps, ``sum - size`` underflows."""
    sum_N = value_N + (((_mix(seed_N) >> _HALF) * size) >> _HALF)
    return np.minimum(sum_N, sum_N - size)
