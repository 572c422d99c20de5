"""Samples of a mixture -> token rows, read shard by shard from the memory-mapped files.

Many samples are located at once, because a numpy call costs more than the few rows of one batch. Their rows are copied in
chunks that fit into the CPU's cache, where the batches find them.

Samples may be located over many shuffle windows; shards are opened for one window at a time. Only a
:class:`~data_loaders.dataset.Dataset` holds open shards, never more than its window has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_loaders.dataset import Dataset
from data_loaders.mixture import Mixture
from data_loaders.order import RowAddresses
from data_loaders.permutation import IntArray
from data_loaders.shards import as_items
from raydist.core.rows import Rows


@dataclass(frozen=True)
class Chunk:
    """Some consecutive samples of one rank, copied out of their shards but still compact.

    Attributes:
        tokens_NS: in the shards' token type.
        documents_NS: which document of its row a token belongs to, int16, or int32 for rows of ``2**15`` tokens or more.
        loss_mask_NS: loss masks, or None.
        rows_N: global row ids.
        epochs_N: how often each row was read before.
        samples_N: each row's number in the whole run.
    """

    tokens_NS: npt.NDArray[Any]
    documents_NS: npt.NDArray[np.signedinteger[Any]]
    loss_mask_NS: npt.NDArray[np.bool_] | None
    rows_N: IntArray
    epochs_N: IntArray
    samples_N: IntArray

    def batches(self, num_rows: int, *, first_step: int) -> Iterator[Rows]:
        """Batches of ``num_rows`` rows: views, but for the tokens, which are widened when their batch is taken, so that they
        stay in the CPU's cache.
        """
        num_batches = len(self.rows_N) // num_rows

        def views(array_N: npt.NDArray[Any]) -> tuple[Tensor, ...]:
            """One a batch, in one call, which costs a fraction of a call for each."""
            whole = torch.from_numpy(array_N[: num_batches * num_rows])
            return whole.view(num_batches, num_rows, *array_N.shape[1:]).unbind()

        return map(
            Rows,
            itertools.count(first_step),
            map(Tensor.long, views(self.tokens_NS)),
            views(self.documents_NS),
            itertools.repeat(None) if self.loss_mask_NS is None else views(self.loss_mask_NS),
            views(self.rows_N),
            views(self.epochs_N),
            views(self.samples_N),
        )


def gather(mixture: Mixture, samples_N: IntArray, *, chunk_rows: int, step_rows: int | None = None) -> Iterator[Chunk]:
    """Reads samples of a mixture in order, in chunks of ``chunk_rows``; a chunk visits each shard once.

    A chunk ends early where a dataset comes to its next window, so that nobody waits for that window's shards before they
    are needed; but each ``step_rows`` rows stay together (default: those of a chunk), and may then lie in two windows.
    """
    datasets_N, addresses = mixture.locate(samples_N)
    located = _Located(samples_N, datasets_N, addresses)
    for start, stop in itertools.pairwise(_window_edges(mixture, located, step_rows=step_rows or chunk_rows)):
        yield from _read(mixture, located[start:stop], chunk_rows=chunk_rows)


@dataclass(frozen=True)
class _Located:
    """Samples, the dataset of each, and the address of its row there."""

    samples_N: IntArray
    datasets_N: IntArray
    addresses: RowAddresses

    def __getitem__(self, chosen: slice) -> _Located:
        return _Located(self.samples_N[chosen], self.datasets_N[chosen], self.addresses[chosen])


def _window_edges(mixture: Mixture, located: _Located, *, step_rows: int) -> list[int]:
    """The steps that first need a window, beside the begin and the end.

    A mixture's shuffle swaps neighbours: some samples of the window before may come after.
    """
    edges = {0, len(located.samples_N)}
    for d, dataset in enumerate(mixture.datasets):
        if len(dataset.manifest.shards) <= dataset.max_open_shards:
            continue
        chosen_N = np.flatnonzero(located.datasets_N == d)
        newest_N = np.maximum.accumulate(located.addresses.windows_N[chosen_N])
        edges.update((chosen_N[1:][np.diff(newest_N) > 0] // step_rows * step_rows).tolist())
    return sorted(edges)


def _read(mixture: Mixture, located: _Located, *, chunk_rows: int) -> Iterator[Chunk]:
    """The chunks of samples. The first is copied while the shards are opened, since in two windows they are too many to
    be open together; the others mostly lie in one window and find its shards open.
    """
    samples_N, addresses = located.samples_N, located.addresses
    edges = [*range(0, len(samples_N), chunk_rows), len(samples_N)]
    begins, groups = [np.arange(len(samples_N)) * (mixture.seq_len + 1)], []
    counts_N = np.ones_like(samples_N)
    opening = [_empty(mixture, edges[1])]
    for dataset, shard, chosen_G in _groups(located.datasets_N, addresses.shards_N):
        edges_in_group = np.searchsorted(chosen_G, edges).tolist()
        group = _Group(mixture.datasets[dataset], shard, chosen_G, addresses.local_rows_N[chosen_G], edges_in_group)
        cuts_K, num_cuts_G = group.cuts(seq_len=mixture.seq_len, begins_G=begins[0][chosen_G])
        begins.append(cuts_K)
        counts_N[chosen_G] += num_cuts_G
        group.copy(0, start=0, copies=opening[0])
        groups.append(group)
    lengths_P, numbers_P, first_pieces_N1 = _pieces(begins, counts_N, row_tokens=mixture.seq_len + 1)
    for index, (start, stop) in enumerate(itertools.pairwise(edges)):
        copies = opening.pop() if opening else _copied(mixture, groups, index, start=start, stop=stop)
        pieces = slice(first_pieces_N1[start], first_pieces_N1[stop])
        yield Chunk(
            copies.tokens_NS,
            numbers_P[pieces].repeat(lengths_P[pieces]).reshape(stop - start, -1),
            copies.loss_mask_NS,
            addresses.rows_N[start:stop],
            addresses.epochs_N[start:stop],
            samples_N[start:stop],
        )


@dataclass(frozen=True)
class _Copies:
    """A chunk's tokens and loss mask, to be filled, and a view of the tokens with a row as one item."""

    tokens_NS: npt.NDArray[Any]
    loss_mask_NS: npt.NDArray[np.bool_] | None
    items_N: npt.NDArray[np.void]


def _empty(mixture: Mixture, num_rows: int) -> _Copies:
    tokens_NS = np.empty((num_rows, mixture.seq_len + 1), dtype=mixture.manifest.token_dtype)
    mask_NS = np.empty(tokens_NS.shape, dtype=np.bool_) if mixture.has_loss_mask else None
    return _Copies(tokens_NS, mask_NS, as_items(tokens_NS))


def _copied(mixture: Mixture, groups: Sequence[_Group], chunk: int, *, start: int, stop: int) -> _Copies:
    """Tokens and loss mask of samples ``[start, stop)``, which are the chunk's."""
    copies = _empty(mixture, stop - start)
    for group in groups:
        group.copy(chunk, start=start, copies=copies)
    return copies


@dataclass(frozen=True)
class _Group:
    """The samples that lie in one shard, which is opened when it is read and held by its dataset only.

    Attributes:
        chosen_G: which samples, in rising order.
        rows_G: their rows in the shard.
        edges: chunk k takes the samples from ``edges[k]`` to ``edges[k + 1]`` of the group.
    """

    dataset: Dataset
    shard_index: int
    chosen_G: IntArray
    rows_G: IntArray
    edges: list[int]

    def cuts(self, *, seq_len: int, begins_G: IntArray) -> tuple[IntArray, IntArray]:
        """Positions of the document boundaries strictly inside rows, if row g begins at position ``begins_G[g]``; and how
        many each row has.
        """
        shard = self.dataset.shard(self.shard_index)
        first_cuts_R1 = shard.rows(seq_len).first_cuts_R1
        first_G = first_cuts_R1[self.rows_G]
        counts_G = first_cuts_R1[self.rows_G + 1] - first_G
        ends_G = counts_G.cumsum()
        indices_K = np.arange(ends_G[-1]) + (first_G + counts_G - ends_G).repeat(counts_G)
        return shard.boundaries_D[indices_K] + (begins_G - self.rows_G * seq_len).repeat(counts_G), counts_G

    def copy(self, chunk: int, *, start: int, copies: _Copies) -> None:
        """Copies what a chunk that begins at sample ``start`` takes of the shard to its place."""
        tokens_NS, mask_NS = copies.tokens_NS, copies.loss_mask_NS
        taken = slice(self.edges[chunk], self.edges[chunk + 1])
        if taken.start == taken.stop:
            return
        places_G, rows_G = self.chosen_G[taken] - start, self.rows_G[taken]
        seq_len = tokens_NS.shape[1] - 1
        shard = self.dataset.shard(self.shard_index)
        rows = shard.rows(seq_len)
        if rows.tokens_RS.dtype == tokens_NS.dtype:
            copies.items_N[places_G] = rows.items_R[rows_G]
        else:
            tokens_NS[places_G] = rows.tokens_RS[rows_G]
        if mask_NS is not None:
            mask_NS[places_G] = shard.mask_rows(rows_G, seq_len=seq_len)


def _groups(datasets_N: IntArray, shards_N: IntArray) -> Iterator[tuple[int, int, IntArray]]:
    """Dataset, shard, and which samples lie there; in the order in which the samples first need the shards."""
    keys_N = datasets_N * (int(shards_N.max()) + 1) + shards_N
    narrow_N = keys_N.astype(np.min_scalar_type(int(keys_N.max())))
    by_shard_N = np.argsort(narrow_N, kind="stable")
    groups = np.split(by_shard_N, np.flatnonzero(np.diff(keys_N[by_shard_N])) + 1)
    for chosen_G in sorted(groups, key=lambda chosen_G: int(chosen_G[0])):
        first = chosen_G[0]
        yield int(datasets_N[first]), int(shards_N[first]), chosen_G


def _pieces(
    begins: Sequence[IntArray], counts_N: IntArray, *, row_tokens: int
) -> tuple[IntArray, npt.NDArray[np.signedinteger[Any]], IntArray]:
    """Lengths of the pieces that begin at these positions, of which each row has so many; their numbers in their rows, and
    each row's first piece.
    """
    begins_P = np.sort(np.concatenate(begins))
    first_N1 = np.append(0, counts_N.cumsum())
    numbers_P = np.arange(len(begins_P)) - first_N1[:-1].repeat(counts_N)
    return (
        np.diff(begins_P, append=len(counts_N) * row_tokens),
        numbers_P.astype(np.int16 if row_tokens < 1 << 15 else np.int32),
        first_N1,
    )
