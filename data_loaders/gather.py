"""Samples of a mixture -> token rows, read shard by shard from the memory-mapped files.

Addresses, shards and document boundaries are worked out for a chunk of samples at once, because numpy calls cost more than
the few rows of one batch; tokens then leave the chunk batch by batch, cast and numbered while they are in the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_loaders.mixture import Mixture
from data_loaders.permutation import IntArray
from data_loaders.shards import Shard
from raydist.core.rows import Rows


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples of one rank, copied out of their shards.

    Attributes:
        tokens_MS: rows in the order of their shards, in the shards' token type.
        mask_MS: their loss masks, or None.
        places_N: where in ``tokens_MS`` each sample's row is.
        segment_lengths_K: tokens of each piece of a document that lies in one row, over all samples in order.
        segment_numbers_K: the piece's number in its row, int32.
        first_segments_N1: the first piece of each sample; the last entry is the number of pieces.
        rows_N: global row ids.
        epochs_N: how often each row was read before.
    """

    tokens_MS: npt.NDArray[Any]
    mask_MS: npt.NDArray[np.bool_] | None
    places_N: IntArray
    segment_lengths_K: IntArray
    segment_numbers_K: npt.NDArray[np.int32]
    first_segments_N1: IntArray
    rows_N: IntArray
    epochs_N: IntArray

    def rows(self, start: int, stop: int, *, step: int) -> Rows:
        """Samples ``[start, stop)`` of the chunk as one batch."""
        places_B = self.places_N[start:stop]
        pieces = slice(self.first_segments_N1[start], self.first_segments_N1[stop])
        documents_BS = np.repeat(self.segment_numbers_K[pieces], self.segment_lengths_K[pieces])
        return Rows(
            step=step,
            tokens_BS=torch.from_numpy(self.tokens_MS[places_B].astype(np.int64)),
            documents_BS=torch.from_numpy(documents_BS.reshape(stop - start, -1)),
            loss_mask_BS=None if self.mask_MS is None else torch.from_numpy(self.mask_MS[places_B]),
            rows_B=torch.from_numpy(self.rows_N[start:stop]),
            epochs_B=torch.from_numpy(self.epochs_N[start:stop]),
        )


def gather(mixture: Mixture, samples_N: IntArray) -> Chunk:
    """Reads samples of a mixture in one pass over the shards that hold them."""
    num_samples, length = len(samples_N), mixture.seq_len + 1
    datasets_N, addresses = mixture.locate(samples_N)
    starts_N = addresses.local_rows_N * mixture.seq_len
    tokens_MS = np.empty((num_samples, length), dtype=mixture.manifest.token_dtype)
    mask_MS = np.empty((num_samples, length), dtype=np.bool_) if mixture.has_loss_mask else None
    samples_M = np.empty(num_samples, dtype=np.int64)
    cuts, cut_samples = [], []
    done = 0
    for dataset, shard_index, chosen_G in _groups(datasets_N, addresses.shards_N):
        shard = mixture.datasets[dataset].shard(shard_index)
        group = slice(done, done + len(chosen_G))
        starts_G = starts_N[chosen_G]
        samples_M[group] = chosen_G
        tokens_MS[group] = shard.rows(starts_G, length=length)
        if mask_MS is not None:
            mask_MS[group] = shard.mask_rows(starts_G, length=length)
        owners_K, cuts_K = _boundaries(shard, starts_G, length=length)
        cut_samples.append(chosen_G[owners_K])
        cuts.append(cuts_K)
        done = group.stop
    places_N = np.empty(num_samples, dtype=np.int64)
    places_N[samples_M] = np.arange(num_samples)
    lengths_K, numbers_K, first_N1 = _segments(np.concatenate(cut_samples), np.concatenate(cuts), num_samples, length)
    return Chunk(tokens_MS, mask_MS, places_N, lengths_K, numbers_K, first_N1, addresses.rows_N, addresses.epochs_N)


def _groups(datasets_N: IntArray, shards_N: IntArray) -> Iterator[tuple[int, int, IntArray]]:
    """Dataset, shard, and which samples lie there; in the order in which the samples first need the shards."""
    keys_N = datasets_N * (int(shards_N.max(initial=0)) + 1) + shards_N
    _, first_G, group_N = np.unique(keys_N, return_index=True, return_inverse=True)
    by_group_N = np.argsort(group_N, kind="stable")
    ends_G = np.cumsum(np.bincount(group_N, minlength=len(first_G)))
    for group in np.argsort(first_G):
        start = ends_G[group - 1] if group else 0
        first = first_G[group]
        yield int(datasets_N[first]), int(shards_N[first]), by_group_N[start : ends_G[group]]


def _boundaries(shard: Shard, starts_G: IntArray, *, length: int) -> tuple[IntArray, IntArray]:
    """Document boundaries strictly inside rows: the index of each one's row, and its position in the row."""
    boundaries_D = shard.boundaries_D
    low_G = np.searchsorted(boundaries_D, starts_G, side="right")
    counts_G = np.searchsorted(boundaries_D, starts_G + length, side="left") - low_G
    owners_K = np.repeat(np.arange(len(starts_G)), counts_G)
    before_G = np.cumsum(counts_G) - counts_G
    indices_K = np.arange(len(owners_K)) - (before_G - low_G)[owners_K]
    return owners_K, boundaries_D[indices_K] - starts_G[owners_K]


def _segments(
    samples_K: IntArray, cuts_K: IntArray, num_samples: int, length: int
) -> tuple[IntArray, npt.NDArray[np.int32], IntArray]:
    """Lengths and numbers of the pieces that boundaries cut rows into, and each row's first piece."""
    counts_N = np.bincount(samples_K, minlength=num_samples) + 1
    first_N1 = np.concatenate([[0], np.cumsum(counts_N)])
    samples_S = np.repeat(np.arange(num_samples), counts_N)
    numbers_S = np.arange(len(samples_S)) - first_N1[samples_S]
    begins_S = np.zeros(len(samples_S) + 1, dtype=np.int64)
    begins_S[:-1] = samples_S * length
    begins_S[-1] = num_samples * length
    begins_S[np.flatnonzero(numbers_S)] += cuts_K[np.argsort(samples_K, kind="stable")]
    return np.diff(begins_S), numbers_S.astype(np.int32), first_N1
