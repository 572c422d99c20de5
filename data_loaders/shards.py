"""One shard: an Arrow IPC file with one record batch of documents, whole-file zstd in the dataset directory.

The child array of the ``tokens`` list column is the token stream and the list offsets are the document boundaries, so a
row of any length is a slice of the memory-mapped file. ``document_id`` names the source of each document.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

from data_loaders.manifest import ShardEntry
from data_loaders.permutation import IntArray
from raydist.core import storage
from raydist.core.errors import DataError

SUFFIX = ".arrow.zst"
_CHUNK_BYTES = 1 << 20
_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class ShardColumns:
    """The documents of one shard before they are written.

    Attributes:
        tokens_T: the token stream, uint16 or uint32 ``[T]``.
        offsets_D: document d is ``tokens_T[offsets[d]:offsets[d + 1]]``, int64 ``[D + 1]``.
        document_ids: one a document.
        loss_mask_T: bool ``[T]`` or None.
    """

    tokens_T: npt.NDArray[Any]
    offsets_D: IntArray
    document_ids: Sequence[str]
    loss_mask_T: npt.NDArray[np.bool_] | None = None


def write_shard(folder: str, *, name: str, columns: ShardColumns) -> ShardEntry:
    """Writes ``folder/name`` (local or in a bucket), which appears whole or not at all."""
    offsets = pa.array(columns.offsets_D, type=pa.int64())
    arrays = {"tokens": pa.LargeListArray.from_arrays(offsets, pa.array(columns.tokens_T))}
    if columns.loss_mask_T is not None:
        arrays["loss_mask"] = pa.LargeListArray.from_arrays(offsets, pa.array(columns.loss_mask_T))
    arrays["document_id"] = pa.array(columns.document_ids, type=pa.large_string())
    batch = pa.record_batch(arrays)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    raw = sink.getvalue()
    compressed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(raw)
    storage.write_bytes(storage.join(folder, name), compressed)
    return ShardEntry(
        name=name,
        documents=len(columns.document_ids),
        tokens=len(columns.tokens_T),
        compressed_bytes=len(compressed),
        raw_bytes=raw.size,
        compressed_sha256=hashlib.sha256(compressed).hexdigest(),
        raw_sha256=hashlib.sha256(raw).hexdigest(),
    )


def decompress_shard(path: str, *, target: str, entry: ShardEntry) -> None:
    """Streams a shard from the dataset directory into a plain local file, checking size and both hashes on the way.

    The output never grows past the manifest's size, whatever the compressed bytes say.

    Raises:
        DataError: the shard is missing, truncated, or not the one that the manifest names.
    """
    compressed_hash, raw_hash = hashlib.sha256(), hashlib.sha256()
    compressed_bytes = raw_bytes = 0
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    failure: str | None = None
    try:
        with storage.open_read(path) as reader, open(target, "wb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                compressed_hash.update(chunk)
                compressed_bytes += len(chunk)
                if failure is not None:
                    continue
                try:
                    plain = decompressor.decompress(chunk)
                except zstandard.ZstdError as error:
                    failure = str(error)
                    continue
                raw_bytes += len(plain)
                if raw_bytes > entry.raw_bytes:
                    failure = "more bytes than the manifest says"
                    continue
                raw_hash.update(plain)
                writer.write(plain)
    except FileNotFoundError:
        raise DataError("a shard is missing", where=path, fix=_RESTORE) from None
    if compressed_bytes != entry.compressed_bytes:
        word = "truncated" if compressed_bytes < entry.compressed_bytes else "longer than it was"
        raise DataError(
            f"a shard is {word}",
            where=path,
            found=f"{compressed_bytes} bytes",
            expected=f"{entry.compressed_bytes} bytes",
            fix=_RESTORE,
        )
    found, expected = compressed_hash.hexdigest(), entry.compressed_sha256
    if found == expected:
        found, expected = raw_hash.hexdigest(), entry.raw_sha256
    if found != expected or failure is not None:
        raise DataError(
            "a shard does not match its hash",
            where=path,
            found=f"sha256 {found}" + (f" ({failure})" if failure else ""),
            expected=f"sha256 {expected}",
            fix=_RESTORE,
        )


_RESTORE = "restore the file or prepare the dataset again; `raydist data verify DIR` checks all shards"


@dataclass(frozen=True)
class ShardRows:
    """A shard cut into rows of ``S = seq_len + 1`` tokens; a row's last token is the next row's first.

    Attributes:
        tokens_RS: a view of the token stream, ``[R, S]``.
        items_R: the same view with a row as one item, see :func:`as_items`.
        first_cuts_R1: ``boundaries_D[first_cuts_R1[r]:first_cuts_R1[r + 1]]`` are the document boundaries strictly
            inside row r.
    """

    tokens_RS: npt.NDArray[Any]
    items_R: npt.NDArray[np.void]
    first_cuts_R1: IntArray


def as_items(tokens_RS: npt.NDArray[Any]) -> npt.NDArray[np.void]:
    """A view of rows as single items, which numpy picks and places faster than parts of a last axis."""
    return tokens_RS.view(np.dtype((np.void, tokens_RS.shape[1] * tokens_RS.itemsize)))[:, 0]


class Shard:
    """A plain shard file, memory-mapped; the arrays are views of the file.

    Attributes:
        tokens_T: the token stream, uint16 or uint32 ``[T]``.
        offsets_D: document d is ``tokens_T[offsets[d]:offsets[d + 1]]``, int64 ``[D + 1]``.
        boundaries_D: the offsets without repetitions, which empty documents make.
    """

    def __init__(self, path: str, *, entry: ShardEntry) -> None:
        self.path = path
        try:
            batch = _only_batch(pa.memory_map(path))
            tokens = batch.column("tokens")
            self.offsets_D: IntArray = tokens.offsets.to_numpy()
            self.tokens_T: npt.NDArray[Any] = tokens.values.to_numpy()
            self._document_ids = batch.column("document_id")
            self._mask = batch.column("loss_mask").values if "loss_mask" in batch.schema.names else None
        except FileNotFoundError:  # evicted from the cache
            raise
        except (pa.ArrowInvalid, KeyError, AttributeError, OSError) as error:
            raise DataError("not a token shard", where=path, found=str(error), fix=f"delete {path}") from None
        found = (len(self.offsets_D) - 1, len(self.tokens_T), int(self.offsets_D[0]), int(self.offsets_D[-1]))
        if found != (entry.documents, entry.tokens, 0, entry.tokens):
            raise DataError(
                "a cached shard is not what the manifest says",
                where=path,
                found=f"{found[0]} documents, {found[1]} tokens",
                expected=f"{entry.documents} documents, {entry.tokens} tokens",
                fix=f"delete {path}; it is fetched again",
            )
        is_new_D = np.concatenate([[True], np.diff(self.offsets_D) > 0])
        self.boundaries_D: IntArray = self.offsets_D if is_new_D.all() else self.offsets_D[is_new_D]
        self._rows: dict[int, ShardRows] = {}

    def document_id(self, document: int) -> str:
        """The stable id of a document of this shard."""
        return str(self._document_ids[document].as_py())

    def rows(self, seq_len: int) -> ShardRows:
        """The rows of a length, worked out once."""
        if seq_len not in self._rows:
            self._rows[seq_len] = self._rows_of(seq_len)
        return self._rows[seq_len]

    def _rows_of(self, seq_len: int) -> ShardRows:
        tokens_RS = np.lib.stride_tricks.sliding_window_view(self.tokens_T, seq_len + 1)[::seq_len]
        starts_R1 = np.arange(len(tokens_RS) + 1) * seq_len
        first_cuts_R1 = np.searchsorted(self.boundaries_D, starts_R1, side="right")
        return ShardRows(tokens_RS, as_items(tokens_RS), first_cuts_R1)

    def mask_rows(self, rows_G: IntArray, *, seq_len: int) -> npt.NDArray[np.bool_]:
        """The loss mask of rows, bool ``[G, seq_len + 1]``; all True where the shard has none."""
        masks_GS = np.ones((len(rows_G), seq_len + 1), dtype=np.bool_)
        if self._mask is not None:
            for mask_S, row in zip(masks_GS, rows_G.tolist(), strict=True):
                mask_S[:] = self._mask.slice(row * seq_len, seq_len + 1).to_numpy(zero_copy_only=False)
        return masks_GS


def _only_batch(source: Any) -> Any:
    reader = pa.ipc.open_file(source)
    if reader.num_record_batches != 1:
        raise pa.ArrowInvalid(f"{reader.num_record_batches} record batches instead of 1")
    batch = reader.get_batch(0)
    batch.validate()
    return batch


def check_shard(path: str, *, entry: ShardEntry, vocab_size: int, scratch: str) -> None:
    """Reads a shard in full: hashes, offsets that never fall, token ids below the vocabulary size.

    Raises:
        DataError: at the first damage, naming the shard.
    """
    plain = os.path.join(scratch, "shard.arrow")
    decompress_shard(path, target=plain, entry=entry)
    shard = Shard(plain, entry=entry)
    if np.any(np.diff(shard.offsets_D) < 0):
        raise DataError("document offsets go backwards", where=path, fix=_RESTORE)
    if len(shard.tokens_T) and int(shard.tokens_T.max()) >= vocab_size:
        raise DataError(
            "a token id is outside the vocabulary",
            where=path,
            found=int(shard.tokens_T.max()),
            expected=f"below {vocab_size}",
            fix=_RESTORE,
        )
