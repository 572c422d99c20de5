"""Samples of a mixture -> token rows, read shard by shard from the memory-mapped files.

Many samples are read at once, because a numpy call costs more than the few rows of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_loaders.mixture import Mixture
from data_loaders.permutation import IntArray
from data_loaders.shards import Shard
from raydist.core.rows import Rows


@dataclass(frozen=True)
class RowBlock:
    """The rows of consecutive steps of one rank; shapes and types are those of :class:`~raydist.core.rows.Rows`."""

    tokens_NS: Tensor
    documents_NS: Tensor
    loss_mask_NS: Tensor | None
    rows_N: Tensor
    epochs_N: Tensor

    def batches(self, num_rows: int, *, first_step: int) -> Iterator[Rows]:
        """Batches of ``num_rows`` rows each, as views."""
        columns = zip(
            self.tokens_NS.split(num_rows),
            self.documents_NS.split(num_rows),
            self.rows_N.split(num_rows),
            self.epochs_N.split(num_rows),
            strict=True,
        )
        masks = None if self.loss_mask_NS is None else self.loss_mask_NS.split(num_rows)
        for index, (tokens_BS, documents_BS, rows_B, epochs_B) in enumerate(columns):
            mask_BS = None if masks is None else masks[index]
            yield Rows(first_step + index, tokens_BS, documents_BS, mask_BS, rows_B, epochs_B)


def gather(mixture: Mixture, samples_N: IntArray) -> RowBlock:
    """Reads samples of a mixture; each shard that holds some of them is visited once."""
    num_samples, length = len(samples_N), mixture.seq_len + 1
    datasets_N, addresses = mixture.locate(samples_N)
    tokens_NS = np.empty((num_samples, length), dtype=np.int64)
    mask_NS = np.empty((num_samples, length), dtype=np.bool_) if mixture.has_loss_mask else None
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
    documents_NS = _documents(np.concatenate(cut_samples), np.concatenate(cuts), shape=(num_samples, length))
    return RowBlock(
        tokens_NS=torch.from_numpy(tokens_NS),
        documents_NS=torch.from_numpy(documents_NS),
        loss_mask_NS=None if mask_NS is None else torch.from_numpy(mask_NS),
        rows_N=torch.from_numpy(addresses.rows_N),
        epochs_N=torch.from_numpy(addresses.epochs_N),
    )


def _groups(datasets_N: IntArray, shards_N: IntArray) -> Iterator[tuple[int, int, IntArray]]:
    """Dataset, shard, and which samples lie there; in the order in which the samples first need the shards."""
    keys_N = datasets_N * (int(shards_N.max(initial=0)) + 1) + shards_N
    _, first_G = np.unique(keys_N, return_index=True)
    for first in np.sort(first_G).tolist():
        yield int(datasets_N[first]), int(shards_N[first]), np.flatnonzero(keys_N == keys_N[first])


def _cuts(shard: Shard, rows_G: IntArray, *, seq_len: int) -> tuple[IntArray, IntArray]:
    """Document boundaries strictly inside rows: the index of each one's row, and its position in the row."""
    first_cuts_R1 = shard.rows(seq_len).first_cuts_R1
    first_G = first_cuts_R1[rows_G]
    counts_G = first_cuts_R1[rows_G + 1] - first_G
    owners_K = np.repeat(np.arange(len(rows_G)), counts_G)
    before_G = np.cumsum(counts_G) - counts_G
    indices_K = np.arange(len(owners_K)) + (first_G - before_G)[owners_K]
    return owners_K, shard.boundaries_D[indices_K] - rows_G[owners_K] * seq_len


def _documents(samples_K: IntArray, cuts_K: IntArray, *, shape: tuple[int, int]) -> npt.NDArray[np.int32]:
    """The number, in its row, of the piece that each token belongs to, when rows are cut at positions."""
    num_samples, length = shape
    counts_N = np.bincount(samples_K, minlength=num_samples) + 1
    first_pieces_N = np.cumsum(counts_N) - counts_N
    samples_P = np.repeat(np.arange(num_samples), counts_N)
    numbers_P = np.arange(len(samples_P)) - first_pieces_N[samples_P]
    begins_P = samples_P * length
    begins_P[np.flatnonzero(numbers_P)] += cuts_K[np.argsort(samples_K, kind="stable")]
    lengths_P = np.diff(begins_P, append=num_samples * length)
    return np.repeat(numbers_P.astype(np.int32), lengths_P).reshape(shape)
