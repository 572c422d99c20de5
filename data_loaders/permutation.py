"""Random-access permutations: where index ``i`` of a shuffled range goes, without shuffling the range.

An unbalanced Feistel network permutes ``2**b`` integers for the smallest ``b`` that covers the range; results outside
the range are walked through the network again until they fall inside (cycle walking; Black and Rogaway 2002, "Ciphers
with arbitrary finite domains"). On average fewer than two walks are needed, because ``2**b < 2 * size``.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_NUM_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_SHIFT_A = np.uint64(30)
_SHIFT_B = np.uint64(27)


def order_key(seed: int, purpose: str, *numbers: int) -> int:
    """A 64-bit key for one purpose of one seed; different numbers (epoch, dataset, ...) give unrelated keys."""
    text = "\x00".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> _SHIFT_A)) * _MIX_A
    return (value ^ (value >> _SHIFT_B)) * _MIX_B


def keyed_permutation(index_N: IntArray, *, size: IntArray | int, key: int, tweak: IntArray | int = 0) -> IntArray:
    """Images of indices under keyed permutations, int64 ``[N]``.

    Args:
        index_N: int64 ``[N]``, each in ``[0, size)``.
        size: length of the permuted range, one for all or one for each index; at most 2**52.
        key: 64-bit key (see :func:`order_key`).
        tweak: chooses one of a family of unrelated permutations under the key, one for all or one for each index.
    """
    size_N = np.broadcast_to(np.asarray(size, dtype=np.int64), index_N.shape)
    tweak_N = np.broadcast_to(np.asarray(tweak, dtype=np.int64), index_N.shape).astype(np.uint64)
    with np.errstate(over="ignore"):
        key_N = _mix(tweak_N * _GOLDEN + np.uint64(key))
        result_N = _feistel(index_N.astype(np.uint64), size_N, key_N)
        outside_M = np.flatnonzero(result_N >= size_N.astype(np.uint64))
        while outside_M.size:
            walked_M = _feistel(result_N[outside_M], size_N[outside_M], key_N[outside_M])
            result_N[outside_M] = walked_M
            outside_M = outside_M[walked_M >= size_N[outside_M].astype(np.uint64)]
    return result_N.astype(np.int64)


def _feistel(
    value_N: npt.NDArray[np.uint64], size_N: IntArray, key_N: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """One pass through the network on ``bit_length(size - 1)`` bits, which is the exponent that frexp gives."""
    num_bits_N = np.frexp((size_N - 1).astype(np.float64))[1].astype(np.uint64)
    one = np.uint64(1)
    high_bits_N = num_bits_N >> one
    low_bits_N = num_bits_N - high_bits_N
    high_mask_N, low_mask_N = (one << high_bits_N) - one, (one << low_bits_N) - one
    high_N, low_N = value_N >> low_bits_N, value_N & low_mask_N
    for _ in range(_NUM_ROUNDS // 2):
        key_N = key_N + _GOLDEN
        high_N = high_N ^ ((_mix(low_N + key_N) >> _SHIFT_A) & high_mask_N)
        key_N = key_N + _GOLDEN
        low_N = low_N ^ ((_mix(high_N + key_N) >> _SHIFT_A) & low_mask_N)
    return (high_N << low_bits_N) | low_N
