"""Second half of preparation: duplicates go, the splits part, documents are shuffled into shards of equal size.

Order, split and duplicates are all decided by the keyed hash of a document's content: the dataset does not depend on
how the inputs were named, grouped or ordered, and a document never moves between the splits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_loaders.manifest import ShardEntry
from data_loaders.parts import PartRecord, read_part
from data_loaders.permutation import IntArray
from data_loaders.shards import SUFFIX, ShardColumns, write_shard
from raydist.core import storage

_NUM_LENGTH_BINS = 40


@dataclass(frozen=True)
class DocumentTable:
    """All documents that are kept, in the order of their hash.

    Attributes:
        hashes_D: the first 64 bits of the hash, ascending.
        parts_D: index of the document's part.
        documents_D: index of the document inside its part.
        tokens_D: length.
        num_duplicates: documents that were dropped because another one has the same content.
    """

    hashes_D: npt.NDArray[np.uint64]
    parts_D: IntArray
    documents_D: IntArray
    tokens_D: IntArray
    num_duplicates: int

    def split_at(self, fraction: float) -> int:
        """The number of leading documents whose hash falls below a fraction of its range."""
        return int(np.searchsorted(self.hashes_D, np.uint64(min(int(fraction * 2**64), 2**64 - 1))))

    def length_histogram(self, start: int, stop: int) -> tuple[int, ...]:
        """Documents ``[start, stop)`` counted by the whole part of log2 of their tokens."""
        bins = np.frexp(np.maximum(self.tokens_D[start:stop], 1).astype(np.float64))[1] - 1
        counts = np.bincount(bins, minlength=1)[:_NUM_LENGTH_BINS]
        return tuple(int(count) for count in counts)


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: document ``documents_D[i]`` of part ``part_paths[parts_D[i]]``, in this order."""

    folder: str
    name: str
    record_path: str
    part_paths: tuple[str, ...]
    parts_D: IntArray
    documents_D: IntArray
    with_loss_mask: bool


def collect_documents(parts: Sequence[PartRecord]) -> DocumentTable:
    """Reads the hashes and lengths of all parts; of equal documents the first is kept."""
    hashes, part_indices, document_indices, lengths = [], [], [], []
    for index, part in enumerate(parts):
        if part.num_documents == 0:
            continue
        table = read_part(part.path)
        column = table["hash"].combine_chunks()
        hashes.append(np.frombuffer(b"".join(column.to_pylist()), dtype=">u8").reshape(-1, 2))
        part_indices.append(np.full(part.num_documents, index, dtype=np.int64))
        document_indices.append(np.arange(part.num_documents, dtype=np.int64))
        lengths.append(np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in table["tokens"].chunks]))
    hash_D2 = np.concatenate(hashes).astype(np.uint64) if hashes else np.zeros((0, 2), dtype=np.uint64)
    order_D = np.lexsort((hash_D2[:, 1], hash_D2[:, 0]))
    ordered_D2 = hash_D2[order_D]
    is_new_D = np.ones(len(order_D), dtype=np.bool_)
    is_new_D[1:] = np.any(ordered_D2[1:] != ordered_D2[:-1], axis=1)
    kept_D = order_D[is_new_D]
    empty = [np.zeros(0, dtype=np.int64)]
    return DocumentTable(
        hashes_D=hash_D2[kept_D, 0],
        parts_D=np.concatenate(part_indices or empty)[kept_D],
        documents_D=np.concatenate(document_indices or empty)[kept_D],
        tokens_D=np.concatenate(lengths or empty)[kept_D],
        num_duplicates=len(order_D) - len(kept_D),
    )


def plan_shards(
    table: DocumentTable,
    start: int,
    stop: int,
    *,
    parts: Sequence[PartRecord],
    folder: str,
    records: str,
    shard_tokens: int,
    with_loss_mask: bool,
) -> list[ShardTask]:
    """Cuts documents ``[start, stop)`` into shards of about equal size, ``shard_tokens`` and one document at most."""
    ends_D = np.cumsum(table.tokens_D[start:stop])
    total = int(ends_D[-1]) if stop > start else 0
    num_shards = max(1, -(-total // shard_tokens)) if stop > start else 0
    cuts = np.searchsorted(ends_D, np.arange(1, num_shards) * (total / max(num_shards, 1)), side="left") + 1
    bounds = np.unique(np.concatenate([[0], np.minimum(cuts, stop - start), [stop - start]])) + start
    tasks = []
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        used, local = np.unique(table.parts_D[low:high], return_inverse=True)
        name = f"shard-{number:05d}{SUFFIX}"
        tasks.append(
            ShardTask(
                folder=folder,
                name=name,
                record_path=storage.join(records, f"{name}.json"),
                part_paths=tuple(parts[index].path for index in used),
                parts_D=local.astype(np.int64),
                documents_D=table.documents_D[low:high],
                with_loss_mask=with_loss_mask,
            )
        )
    return tasks


def make_shard(task: ShardTask) -> ShardEntry:
    """Writes one shard and its record; a shard with a record is not written again."""
    entry = _recorded(task)
    if entry is None:
        entry = write_shard(task.folder, name=task.name, columns=_columns(task))
        storage.write_json(task.record_path, asdict(entry))
    return entry


def _recorded(task: ShardTask) -> ShardEntry | None:
    """What an interrupted preparation wrote, unless another one has since replaced or removed the file."""
    if not storage.exists(task.record_path):
        return None
    entry = ShardEntry(**storage.read_json(task.record_path))
    path = storage.join(task.folder, task.name)
    if not storage.exists(path) or storage.size_bytes(path) != entry.compressed_bytes:
        return None
    return entry if storage.sha256(path) == entry.compressed_sha256 else None


def _columns(task: ShardTask) -> ShardColumns:
    tables, places = [], []
    for index, path in enumerate(task.part_paths):
        chosen = np.flatnonzero(task.parts_D == index)
        tables.append(read_part(path).take(pa.array(task.documents_D[chosen])))
        places.append(chosen)
    table = pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(places))))
    tokens = table["tokens"].combine_chunks()
    offsets_D = tokens.offsets.to_numpy()
    mask_T = None
    if task.with_loss_mask:
        starts_T = np.repeat(offsets_D[:-1], np.diff(offsets_D))
        prompt_T = np.repeat(table["prompt_tokens"].to_numpy(), np.diff(offsets_D))
        mask_T = np.arange(len(tokens.values)) - starts_T >= prompt_T
    return ShardColumns(
        tokens_T=tokens.values.to_numpy(),
        offsets_D=offsets_D,
        document_ids=table["document_id"].to_pylist(),
        loss_mask_T=mask_T,
    )
