"""Minimal edit alignments of many pairs of sequences at once, in numpy.

The dynamic program ``D[i, j] = min(D[i-1, j] + 1, D[i, j-1] + 1, D[i-1, j-1] + e)``, ``e = [x0_i != x1_j]``, has no dependence
inside an antidiagonal ``i + j = d``, so one antidiagonal of all pairs is a handful of array operations. Only differences of
neighbouring cells are kept, which fit a byte. With the vertical difference ``a = D[i, j-1] - D[i-1, j-1] - 1`` of the cell to
the left and the horizontal difference ``b = D[i-1, j] - D[i-1, j-1] - 1`` of the cell above, both in {-2, -1, 0}::

    m = min(e - 2, a, b)        D[i, j] = D[i-1, j-1] + m + 2
    D[i, j] - D[i-1, j] - 1 = m - b        D[i, j] - D[i, j-1] - 1 = m - a

A pair is a minimal last column where ``m = e - 2``, a deletion where ``b < e - 2``; where neither, an insertion is. One byte a
cell remembers which, and the way back follows it for all pairs side by side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PAIR, DELETE, INSERT, NOTHING = 0, 1, 2, 3
"""Columns of an alignment: both symbols, only x0's, only x1's, padding."""

_MAX_TABLE_BYTES = 2**25
_WINDOW_DIAGONALS = 32

Ints = NDArray[np.int64]
Bytes = NDArray[np.int8]


def optimal_columns(first_SA: Ints, second_SB: Ints, *, first_lengths_S: Ints, second_lengths_S: Ints) -> Bytes:
    """The columns of one minimal alignment per pair of sequences, int8 ``[S, N]``, padded with ``NOTHING``.

    The number of columns that are neither ``NOTHING`` nor a pair of equal symbols is the Levenshtein distance. Of several
    minimal alignments the same one is always taken, whatever else is in the batch: from the left, the first of pair, delete,
    insert that keeps the cost minimal.

    Args:
        first_SA: symbols of x0, padded on the right with anything.
        second_SB: symbols of x1, likewise.
        first_lengths_S: symbols of x0 that count.
        second_lengths_S: symbols of x1 that count.
    """
    num_pairs, num_columns = len(first_SA), first_SA.shape[1] + second_SB.shape[1]
    columns_SN = np.empty((num_pairs, num_columns), dtype=np.int8)
    table_bytes = num_pairs * (first_SA.shape[1] + 1) * (num_columns + 1)
    for pairs in np.array_split(np.arange(num_pairs), max(1, -(-table_bytes // _MAX_TABLE_BYTES))):
        lengths = first_lengths_S[pairs], second_lengths_S[pairs]
        # Both are read from their ends, so that the way back through the table runs from left to right.
        first_AS, second_BS = _from_the_end(first_SA[pairs], lengths[0]), _from_the_end(second_SB[pairs], lengths[1])
        columns_SN[pairs] = _walk(_moves(first_AS, second_BS), first_lengths_S=lengths[0], second_lengths_S=lengths[1])
    return columns_SN[:, : int((columns_SN != NOTHING).sum(axis=1).max(initial=0))]


def _from_the_end(symbols_SL: Ints, lengths_S: Ints) -> NDArray[np.int32]:
    """Each row reversed within its length, with the pair as the last axis, int32 ``[L, S]``."""
    index_L1 = np.arange(symbols_SL.shape[1])[:, None]
    source_LS = np.maximum(lengths_S[None, :] - 1 - index_L1, 0)
    return np.ascontiguousarray(np.take_along_axis(symbols_SL.T, source_LS, axis=0).astype(np.int32))


def _moves(first_AS: NDArray[np.int32], second_BS: NDArray[np.int32]) -> Bytes:
    """The column that each cell ends with, ``[A + B + 1, A + 1, S]``: entry (d, i) belongs to cell (i, d - i).

    Some diagonals at a time share one window of i, so that slices are made once for all of them; cells of the window that lie
    outside the table hold numbers that no cell inside reads.
    """
    (num_first, num_pairs), num_second = first_AS.shape, second_BS.shape[0]
    last, two = num_first + num_second, np.int8(2)
    backwards = np.zeros((2 * num_first + num_second, num_pairs), dtype=np.int32)
    backwards[num_first : num_first + num_second] = second_BS[::-1]
    moves = np.empty((last + 1, num_first + 1, num_pairs), dtype=np.int8)
    vertical, even, odd, differs, least, deletes = np.zeros((6, num_first + 1, num_pairs), dtype=np.int8)
    for start in range(2, last + 1, _WINDOW_DIAGONALS):
        stop = min(start + _WINDOW_DIAGONALS, last + 1)
        low, high = max(1, start - num_second), min(num_first, stop - 2)
        inner, above = slice(low, high + 1), slice(low - 1, high)
        symbols, a, e, m, t = first_AS[above], vertical[inner], differs[inner], least[inner], deletes[inner]
        e_bool, t_bool = e.view(np.bool_), t.view(np.bool_)
        horizontal = ((odd[above], even[inner]), (even[above], odd[inner]))
        for diagonal in range(start, stop):
            b, next_horizontal = horizontal[diagonal & 1]
            offset = last - diagonal + low
            vertical[diagonal - 1 : diagonal] = 0  # cell (d - 1, 0)
            np.not_equal(symbols, backwards[offset : offset + high - low + 1], e_bool)
            np.subtract(e, two, e)
            np.minimum(a, b, out=m)
            np.minimum(m, e, out=m)
            np.less(b, e, t_bool)
            np.subtract(e, m, e)
            np.subtract(e, t, t)
            np.add(e, t, moves[diagonal, inner])
            np.subtract(m, a, next_horizontal)
            np.subtract(m, b, a)
    moves[:, 0] = INSERT
    moves[np.arange(1, num_first + 1), np.arange(1, num_first + 1)] = DELETE
    moves[0, 0] = NOTHING
    return moves


def _walk(moves: Bytes, *, first_lengths_S: Ints, second_lengths_S: Ints) -> Bytes:
    """Follows the moves from each pair's last cell to the origin, all pairs at once; ``[S, A + B]``."""
    num_diagonals, height, num_pairs = moves.shape
    row = height * num_pairs
    strides = np.array([2 * row + num_pairs, row + num_pairs, row, 0])
    cells_S = (first_lengths_S + second_lengths_S) * row + first_lengths_S * num_pairs + np.arange(num_pairs)
    flat = moves.reshape(-1)
    columns_NS = np.full((num_diagonals - 1, num_pairs), NOTHING, dtype=np.int8)
    for column_S in columns_NS:
        flat.take(cells_S, out=column_S, mode="clip")
        cells_S -= strides.take(column_S, mode="clip")
        if int(cells_S.max(initial=0)) < num_pairs:
            break
    return columns_NS.T
