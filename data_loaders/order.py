"""Which row of a dataset is read when: a pure function of (seed, epoch, position), with random access.

Shards are permuted in each epoch and grouped into windows; rows are permuted inside a window. World size never enters.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from data_loaders.permutation import IntArray, keyed_permutation, order_key

OrderName = Literal["shuffled", "sequential"]
_CACHED_EPOCHS = 4


@dataclass(frozen=True)
class RowAddresses:
    """Where rows lie.

    Attributes:
        epochs_N: how often each row was read before, int64 ``[N]``.
        shards_N: shard index, int64 ``[N]``.
        local_rows_N: row inside its shard, int64 ``[N]``.
        rows_N: row inside its dataset, counted in file order whatever the order of reading, int64 ``[N]``.
        windows_N: how many windows of the dataset were read before the row's, over all epochs, int64 ``[N]``.
    """

    epochs_N: IntArray
    shards_N: IntArray
    local_rows_N: IntArray
    rows_N: IntArray
    windows_N: IntArray

    def __getitem__(self, chosen: slice) -> RowAddresses:
        return RowAddresses(*(vars(self)[field.name][chosen] for field in fields(self)))


@dataclass(frozen=True)
class _Epoch:
    """The layout of one epoch: shards in order of reading, and where each and its window begin.

    Attributes:
        shards_S: shard index at each place.
        starts_S1: position of the first row of each place; the last entry is the number of rows.
        window_starts_W1: the same of each window.
    """

    shards_S: IntArray
    starts_S1: IntArray
    window_starts_W1: IntArray


class RowOrder:
    """The order of one dataset's rows.

    Args:
        rows_per_shard: int64 ``[num_shards]``.
        seed: of the order.
        window_shards: shards whose rows are shuffled together; bounds what must be open at once.
        order: ``sequential`` reads rows as they lie.
    """

    def __init__(self, rows_per_shard: IntArray, *, seed: int, window_shards: int, order: OrderName) -> None:
        self.rows_per_shard = rows_per_shard
        self.num_rows = int(rows_per_shard.sum())
        self._first_rows_S = np.cumsum(rows_per_shard) - rows_per_shard
        self._seed = seed
        self._window_shards = window_shards
        self._order = order
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, samples_N: IntArray) -> RowAddresses:
        """Addresses of samples of the dataset; sample j is position ``j % num_rows`` of epoch ``j // num_rows``."""
        epochs_N, positions_N = np.divmod(samples_N, self.num_rows)
        shards_N, local_rows_N, windows_N = (np.empty_like(samples_N) for _ in range(3))
        for epoch, chosen_N in _runs(epochs_N):
            located = self._locate_in_epoch(epoch, positions_N[chosen_N])
            shards_N[chosen_N], local_rows_N[chosen_N], windows_N[chosen_N] = located
        return RowAddresses(epochs_N, shards_N, local_rows_N, self._first_rows_S[shards_N] + local_rows_N, windows_N)

    def _locate_in_epoch(self, epoch: int, positions_N: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Shards, rows in them, and windows."""
        layout = self._layout(epoch)
        windows_N = _interval(layout.window_starts_W1, positions_N)
        if self._order == "shuffled":
            key = order_key(self._seed, "rows", epoch)
            positions_N = positions_N.copy()
            for window, chosen_N in _runs(windows_N):
                start, end = layout.window_starts_W1[window : window + 2].tolist()
                inside_N = positions_N[chosen_N] - start
                positions_N[chosen_N] = start + keyed_permutation(inside_N, size=end - start, key=key, tweak=start)
        places_N = _interval(layout.starts_S1, positions_N)
        first_window = epoch * (len(layout.window_starts_W1) - 1)
        return layout.shards_S[places_N], positions_N - layout.starts_S1[places_N], first_window + windows_N

    def _layout(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._make_layout(epoch)
            while len(self._epochs) > _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _make_layout(self, epoch: int) -> _Epoch:
        num_shards = len(self.rows_per_shard)
        shards_S = np.arange(num_shards, dtype=np.int64)
        if self._order == "shuffled":
            shards_S = keyed_permutation(shards_S, size=num_shards, key=order_key(self._seed, "shards", epoch))
        starts_S1 = np.concatenate([[0], np.cumsum(self.rows_per_shard[shards_S])])
        window_starts_W1 = np.append(starts_S1[: num_shards : self._window_shards], starts_S1[-1])
        return _Epoch(shards_S, starts_S1, window_starts_W1)


def _interval(starts_K1: IntArray, positions_N: IntArray) -> IntArray:
    """Which of consecutive intervals, some perhaps empty, each position lies in."""
    return np.searchsorted(starts_K1, positions_N, side="right") - 1


def _runs(values_N: IntArray) -> Iterator[tuple[int, slice]]:
    """Stretches of equal values. Neighbouring samples share their epoch and mostly their window, so they are few."""
    bounds = np.flatnonzero(np.diff(values_N, prepend=-1, append=-1)).tolist()
    for begin, end in itertools.pairwise(bounds):
        yield int(values_N[begin]), slice(begin, end)
