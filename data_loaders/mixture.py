"""Several datasets read as one stream of samples, each with its exact share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data_loaders.cache import NodeCache
from data_loaders.dataset import Dataset, open_dataset
from data_loaders.manifest import Manifest
from data_loaders.order import OrderName, RowAddresses, RowOrder
from data_loaders.permutation import IntArray, keyed_permutation, order_key
from raydist.core.errors import ConfigError, DataError

_FINEST_SHARE = 1000


@dataclass(frozen=True)
class DatasetWeight:
    """A dataset directory and its share of the samples, relative to the others."""

    path: str
    weight: float = 1.0


class Shares:
    """Global sample ``i`` -> (dataset, that dataset's sample), in O(1) and with exact counts.

    Weights are rounded to counts out of a period of about 1000 (at least one a dataset). Every period of samples
    holds exactly these counts, spread evenly and, if shuffled, in a permutation keyed by the period's number.

    Args:
        weights: positive, one a dataset.
        key: 64-bit key of the shuffles, or None to leave every period as it is.
    """

    def __init__(self, weights: Sequence[float], *, key: int | None) -> None:
        self.counts = period_counts(weights)
        self.period = sum(self.counts)
        self._key = key
        self._counts_D = np.array(self.counts, dtype=np.int64)
        datasets_P = np.repeat(np.arange(len(self.counts)), self._counts_D)
        ranks_P = np.concatenate([np.arange(count) for count in self.counts])
        due_P = np.argsort((ranks_P + 0.5) / self._counts_D[datasets_P], kind="stable")
        self._datasets_P, self._ranks_P = datasets_P[due_P], ranks_P[due_P]

    def assign(self, samples_N: IntArray) -> tuple[IntArray, IntArray]:
        """Dataset index and sample index inside the dataset, each int64 ``[N]``."""
        if len(self.counts) == 1:
            return np.zeros_like(samples_N), samples_N
        periods_N, slots_N = np.divmod(samples_N, self.period)
        if self._key is not None:
            slots_N = keyed_permutation(slots_N, size=self.period, key=self._key, tweak=periods_N)
        datasets_N = self._datasets_P[slots_N]
        return datasets_N, periods_N * self._counts_D[datasets_N] + self._ranks_P[slots_N]


def period_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of the weights, by largest remainder out of 1000, without a common factor."""
    exact = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    scaled = [share * _FINEST_SHARE / sum(exact) for share in exact]
    counts = [max(1, math.floor(share)) for share in scaled]
    by_remainder = sorted(range(len(counts)), key=lambda d: scaled[d] - math.floor(scaled[d]), reverse=True)
    for dataset in by_remainder[: max(0, _FINEST_SHARE - sum(counts))]:
        counts[dataset] += 1
    divisor = math.gcd(*counts)
    return tuple(count // divisor for count in counts)


class Mixture:
    """Datasets, their shares and the order of their rows: everything that decides what sample ``i`` is.

    Args:
        datasets: opened datasets; all must have been prepared with the same tokenizer.
        weights: one a dataset.
        seq_len: tokens of a row that the model sees; rows are read with one token more.
        seed: of the order.
        order: ``sequential`` (validation) reads rows as they lie.
        window_shards: see :class:`~data_loaders.order.RowOrder`.

    Raises:
        ConfigError: no dataset.
        DataError: different tokenizers, or a ``seq_len`` too long for a dataset.
        CapacityError: the cache cannot hold a window of every dataset.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        weights: Sequence[float],
        seq_len: int,
        seed: int,
        order: OrderName = "shuffled",
        window_shards: int = 8,
    ) -> None:
        if not datasets:
            raise ConfigError("a mixture needs at least one dataset", where="data.train")
        _require_same_tokenizer(datasets)
        window_shards = window_shards if order == "shuffled" else 1
        datasets[0].cache.require((dataset.manifest for dataset in datasets), window_shards=window_shards)
        self.datasets = tuple(datasets)
        self.seq_len = seq_len
        for dataset in datasets:
            dataset.require_rows(seq_len)
            dataset.max_open_shards = window_shards
        self.shares = Shares(weights, key=order_key(seed, "mixture") if order == "shuffled" else None)
        self.orders = tuple(
            RowOrder(
                dataset.rows_per_shard(seq_len),
                seed=order_key(seed, "dataset", d),
                window_shards=window_shards,
                order=order,
            )
            for d, dataset in enumerate(datasets)
        )
        rows_D = np.array([row_order.num_rows for row_order in self.orders], dtype=np.int64)
        self.num_rows = int(rows_D.sum())
        self.first_rows_D: IntArray = np.cumsum(rows_D) - rows_D
        self.has_loss_mask = any(dataset.manifest.has_loss_mask for dataset in datasets)
        self.sha256 = _mixture_sha256(self.datasets, weights, seq_len, seed, window_shards, order)

    @property
    def manifest(self) -> Manifest:
        """The first dataset's manifest: tokenizer, vocabulary and special ids are those of all."""
        return self.datasets[0].manifest

    def locate(self, samples_N: IntArray) -> tuple[IntArray, RowAddresses]:
        """Dataset index of each sample, and the address of its row; ``rows_N`` are global over the mixture."""
        datasets_N, local_N = self.shares.assign(samples_N)
        if len(self.datasets) == 1:
            return datasets_N, self.orders[0].locate(local_N)
        columns = np.empty((5, len(samples_N)), dtype=np.int64)
        for d, row_order in enumerate(self.orders):
            chosen_N = np.flatnonzero(datasets_N == d)
            found = row_order.locate(local_N[chosen_N])
            columns[:, chosen_N] = (
                found.epochs_N,
                found.shards_N,
                found.local_rows_N,
                found.rows_N + self.first_rows_D[d],
                found.windows_N,
            )
        return datasets_N, RowAddresses(*columns)


def open_mixture(
    parts: Sequence[DatasetWeight],
    *,
    cache: NodeCache,
    seq_len: int,
    seed: int,
    order: OrderName = "shuffled",
    window_shards: int = 8,
) -> Mixture:
    """Opens dataset directories as one :class:`Mixture`."""
    return Mixture(
        [open_dataset(part.path, cache=cache) for part in parts],
        weights=[part.weight for part in parts],
        seq_len=seq_len,
        seed=seed,
        order=order,
        window_shards=window_shards,
    )


def _require_same_tokenizer(datasets: Sequence[Dataset]) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        same_ids = other.manifest.special_ids == first.manifest.special_ids
        if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256 or not same_ids:
            raise DataError(
                "the datasets of a mixture were prepared with different tokenizers",
                where=other.path,
                found=f"{other.manifest.tokenizer_kind} {other.manifest.tokenizer_sha256[:12]}",
                expected=f"{first.manifest.tokenizer_kind} {first.manifest.tokenizer_sha256[:12]} of {first.path}",
                fix=f"prepare it again with --tokenizer {first.path}/{first.manifest.tokenizer_file}",
            )


def _mixture_sha256(
    datasets: Sequence[Dataset], weights: Sequence[float], seq_len: int, seed: int, window_shards: int, order: str
) -> str:
    content = {
        "datasets": [dataset.manifest.sha256 for dataset in datasets],
        "weights": list(map(float, weights)),
        "seq_len": seq_len,
        "seed": seed,
        "window_shards": window_shards,
        "order": order,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
