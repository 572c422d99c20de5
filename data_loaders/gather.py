"""Samples of a mixture -> token rows, read shard by shard from the memory-mapped files.

Many samples are read at once, because a numpy call costs more than the few rows of one batch.
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
    """Consecutive samples of one rank, copied out of their shards but still compact.

    Attributes:
        tokens_NS: in the shards' token type.
        loss_mask_NS: loss masks, or None.
        piece_lengths_P: tokens of each piece of a document that lies in one row, over all samples in order.
        piece_numbers_P: the piece's number in its row, int32.
        first_pieces_N1: the first piece of each sample; the last entry is the number of pieces.
        rows_N: global row ids.
        epochs_N: how often each row was read before.
        samples_N: each row's number in the whole run.
    """

    tokens_NS: npt.NDArray[Any]
    loss_mask_NS: npt.NDArray[np.bool_] | None
    piece_lengths_P: IntArray
    piece_numbers_P: npt.NDArray[np.int32]
    first_pieces_N1: IntArray
    rows_N: IntArray
    epochs_N: IntArray
    samples_N: IntArray

    def batches(self, num_rows: int, *, first_step: int) -> Iterator[Rows]:
        """Batches of ``num_rows`` rows, each widened when it is taken, so that its tensors stay in the CPU's cache."""
        for index in range(len(self.rows_N) // num_rows):
            yield self._batch(index * num_rows, (index + 1) * num_rows, step=first_step + index)

    def _batch(self, start: int, stop: int, *, step: int) -> Rows:
        pieces = slice(self.first_pieces_N1[start], self.first_pieces_N1[stop])
        documents_T = self.piece_numbers_P[pieces].repeat(self.piece_lengths_P[pieces])
        return Rows(
            step=step,
            tokens_BS=torch.from_numpy(self.tokens_NS[start:stop].astype(np.int64)),
            documents_BS=torch.from_numpy(documents_T.reshape(stop - start, -1)),
            loss_mask_BS=None if self.loss_mask_NS is None else torch.from_numpy(self.loss_mask_NS[start:stop]),
            rows_B=torch.from_numpy(self.rows_N[start:stop]),
            epochs_B=torch.from_numpy(self.epochs_N[start:stop]),
            samples_B=torch.from_numpy(self.samples_N[start:stop]),
        )


def gather(mixture: Mixture, samples_N: IntArray) -> Chunk:
    """Reads samples of a mixture; each shard that holds some of them is visited once."""
    shape = len(samples_N), mixture.seq_len + 1
    datasets_N, addresses = mixture.locate(samples_N)
    tokens_NS = np.empty(shape, dtype=mixture.manifest.token_dtype)
    mask_NS = np.empty(shape, dtype=np.bool_) if mixture.has_loss_mask else None
    cuts, cut_samples = [], []
    for dataset, shard_index, chosen_G in _groups(datasets_N, addresses.shards_N):
        shard = mixture.datasets[dataset].shard(shard_index)
        rows_G = addresses.local_rows_N[chosen_G]
        tokens_NS[chosen_G] = shard.rows(mixture.seq_len).tokens_RS[rows_G]
        if mask_NS is not None:
            mask_NS[chosen_G] = shard.mask_rows(rows_G, seq_len=mixture.seq_len)
        owners_K, cuts_K = _cuts(shard, rows_G, seq_len=mixture.seq_len)
        cut_samples.append(chosen_G[owners_K])
        cuts.append(cuts_K)
    pieces = _pieces(np.concatenate(cut_samples), np.concatenate(cuts), shape=shape)
    return Chunk(tokens_NS, mask_NS, *pieces, addresses.rows_N, addresses.epochs_N, samples_N)


def _groups(datasets_N: IntArray, shards_N: IntArray) -> Iterator[tuple[int, int, IntArray]]:
    """Dataset, shard, and which samples lie there; in the order in which the samples first need the shards."""
    keys_N = datasets_N * (int(shards_N.max(initial=0)) + 1) + shards_N
    left_N = np.arange(len(keys_N))
    while left_N.size:
        first = left_N[0]
        same_N = keys_N[left_N] == keys_N[first]
        yield int(datasets_N[first]), int(shards_N[first]), left_N[same_N]
        left_N = left_N[~same_N]


def _cuts(shard: Shard, rows_G: IntArray, *, seq_len: int) -> tuple[IntArray, IntArray]:
    """Document boundaries strictly inside rows: the index of each one's row, and its position in the row."""
    first_cuts_R1 = shard.rows(seq_len).first_cuts_R1
    first_G = first_cuts_R1[rows_G]
    counts_G = first_cuts_R1[rows_G + 1] - first_G
    owners_K = np.repeat(np.arange(len(rows_G)), counts_G)
    before_G = np.cumsum(counts_G) - counts_G
    indices_K = np.arange(len(owners_K)) + (first_G - before_G)[owners_K]
    return owners_K, shard.boundaries_D[indices_K] - rows_G[owners_K] * seq_len


def _pieces(
    samples_K: IntArray, cuts_K: IntArray, *, shape: tuple[int, int]
) -> tuple[IntArray, npt.NDArray[np.int32], IntArray]:
    """Lengths and numbers of the pieces that the cuts make of the rows, and each row's first piece."""
    num_samples, length = shape
    counts_N = np.bincount(samples_K, minlength=num_samples) + 1
    first_N1 = np.concatenate([[0], np.cumsum(counts_N)])
    samples_P = np.repeat(np.arange(num_samples), counts_N)
    numbers_P = np.arange(len(samples_P)) - first_N1[samples_P]
    begins_P = samples_P * length
    begins_P[np.flatnonzero(numbers_P)] += cuts_K[np.argsort(samples_K, kind="stable")]
    return np.diff(begins_P, append=num_samples * length), numbers_P.astype(np.int32), first_N1
