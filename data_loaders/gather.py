"""Samples of a mixture -> token rows, read shard by shard from the memory-mapped files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_loaders.mixture import Mixture
from data_loaders.permutation import IntArray
from data_loaders.shards import Shard


@dataclass(frozen=True)
class GatheredRows:
    """Rows of any number of steps; see :class:`raydist.core.rows.Rows` for each field."""

    tokens_NS: Tensor
    documents_NS: Tensor
    loss_mask_NS: Tensor | None
    rows_N: Tensor
    epochs_N: Tensor


def gather(mixture: Mixture, samples_N: IntArray) -> GatheredRows:
    """Reads samples of a mixture in one pass over the shards that hold them."""
    length = mixture.seq_len + 1
    datasets_N, addresses = mixture.locate(samples_N)
    tokens_NS = np.empty((len(samples_N), length), dtype=np.int64)
    documents_NS = np.zeros((len(samples_N), length), dtype=np.int32)
    mask_NS = np.empty((len(samples_N), length), dtype=np.bool_) if mixture.has_loss_mask else None
    starts_N = addresses.local_rows_N * mixture.seq_len
    for dataset, shard_index, chosen_M in _groups(datasets_N, addresses.shards_N):
        shard = mixture.datasets[dataset].shard(shard_index)
        starts_M = starts_N[chosen_M]
        tokens_NS[chosen_M] = shard.rows(starts_M, length=length)
        _number_documents(documents_NS, chosen_M, starts_M, shard=shard)
        if mask_NS is not None:
            mask_NS[chosen_M] = shard.mask_rows(starts_M, length=length)
    return GatheredRows(
        tokens_NS=torch.from_numpy(tokens_NS),
        documents_NS=torch.from_numpy(documents_NS),
        loss_mask_NS=None if mask_NS is None else torch.from_numpy(mask_NS),
        rows_N=torch.from_numpy(addresses.rows_N),
        epochs_N=torch.from_numpy(addresses.epochs_N),
    )


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


def _number_documents(documents_NS: np.ndarray, chosen_M: IntArray, starts_M: IntArray, *, shard: Shard) -> None:
    """Fills in the document numbers of rows that hold a boundary; the others stay 0.

    A boundary at stream position p in ``(start, start + length)`` adds one to the row from ``p - start`` on. An empty
    document makes two boundaries at one place, which count as one.
    """
    length = documents_NS.shape[1]
    offsets_D = shard.offsets_D
    low_M = np.searchsorted(offsets_D, starts_M, side="right")
    high_M = np.searchsorted(offsets_D, starts_M + length, side="left")
    for sample, start, low, high in zip(chosen_M, starts_M, low_M, high_M, strict=True):
        if high > low:
            documents_NS[sample] = _document_numbers(offsets_D[low:high] - start, length=length)


def _document_numbers(boundaries_K: IntArray, *, length: int) -> np.ndarray:
    starts_S = np.zeros(length, dtype=np.int32)
    starts_S[boundaries_K] = 1
    return np.cumsum(starts_S, dtype=np.int32)
