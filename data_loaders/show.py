"""The documents that a step read, found again from its number alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from data_loaders.mixture import Mixture


@dataclass(frozen=True)
class Segment:
    """The piece of one document that lies inside a row."""

    document_id: str
    num_tokens: int
    text: str


@dataclass(frozen=True)
class ShownRow:
    """One row of a step.

    Attributes:
        row: global row id.
        epoch: how often the row was read before.
        dataset: the dataset's directory.
        segments: its documents, in order.
    """

    row: int
    epoch: int
    dataset: str
    segments: tuple[Segment, ...]


def step_documents(mixture: Mixture, *, first_sample: int, num_rows: int) -> list[ShownRow]:
    """What the samples ``[first_sample, first_sample + num_rows)`` hold, as text with its sources."""
    samples_N = np.arange(first_sample, first_sample + num_rows, dtype=np.int64)
    datasets_N, addresses = mixture.locate(samples_N)
    tokenizer = mixture.datasets[0].tokenizer()
    shown = []
    for n, dataset_index in enumerate(datasets_N):
        dataset = mixture.datasets[dataset_index]
        shard = dataset.shard(int(addresses.shards_N[n]))
        start = int(addresses.local_rows_N[n]) * mixture.seq_len
        stop = start + mixture.seq_len + 1
        low = int(np.searchsorted(shard.offsets_D, start, side="right"))
        high = int(np.searchsorted(shard.offsets_D, stop, side="left"))
        cuts = [start, *shard.offsets_D[low:high].tolist(), stop]
        segments = tuple(
            Segment(shard.document_id(low - 1 + k), end - begin, tokenizer.decode(shard.tokens_T[begin:end].tolist()))
            for k, (begin, end) in enumerate(itertools.pairwise(cuts))
            if end > begin
        )
        shown.append(ShownRow(int(addresses.rows_N[n]), int(addresses.epochs_N[n]), dataset.path, segments))
    return shown
