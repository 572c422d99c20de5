"""Files that are hashed while they are written and verified while they are read.

Hashes are kept for blocks of a few MiB: a reader that needs some bytes of a large file fetches and verifies the blocks
that cover them. So no damaged byte is ever used, and no file is read twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from raydist.core import storage
from raydist.core.errors import CheckpointError

BLOCK_BYTES = 4 << 20
_BLOCKS_PER_FETCH = 16


@dataclass(frozen=True)
class FileRecord:
    """Size and hashes of one file.

    Attributes:
        size_bytes: length of the file.
        sha256: hex digest of the whole file, as ``sha256sum`` prints it.
        block_sha256: hex digest of each block of ``BLOCK_BYTES``; the last block may be shorter.
    """

    size_bytes: int
    sha256: str
    block_sha256: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a marker or a done file."""
        return {"size_bytes": self.size_bytes, "sha256": self.sha256, "block_sha256": list(self.block_sha256)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FileRecord:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError, KeyError, TypeError: it is no such record, or has not one hash a block.
        """
        record = cls(int(value["size_bytes"]), str(value["sha256"]), tuple(str(h) for h in value["block_sha256"]))
        if record.size_bytes < 0 or len(record.block_sha256) != -(-record.size_bytes // BLOCK_BYTES):
            raise ValueError(f"{len(record.block_sha256)} block hashes for {record.size_bytes} bytes")
        return record

    def check_size(self, path: str) -> None:
        """Compares the size on storage with the recorded one.

        Raises:
            CheckpointError: the file is missing or has another size.
        """
        try:
            found = storage.size_bytes(path)
        except FileNotFoundError:
            raise CheckpointError("a file of the checkpoint is missing", where=path) from None
        if found != self.size_bytes:
            raise CheckpointError(
                "a file of the checkpoint has another size",
                where=path,
                found=f"{found} bytes",
                expected=f"{self.size_bytes} bytes",
            )

    def read(self, path: str) -> bytes:
        """The whole verified content of a small file.

        Raises:
            CheckpointError: the content is not what was written.
        """
        with open_verified(path, record=self) as reader:
            return bytes(reader.read(0, self.size_bytes))


class HashingWriter:
    """Writes to a binary stream and hashes what passes, whole and by blocks."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._whole = hashlib.sha256()
        self._block = hashlib.sha256()
        self._blocks: list[str] = []
        self._size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends ``data``."""
        view = memoryview(data)
        while view.nbytes:
            room = BLOCK_BYTES - self._size_bytes % BLOCK_BYTES
            piece, view = view[:room], view[room:]
            self._stream.write(piece)
            self._whole.update(piece)
            self._block.update(piece)
            self._size_bytes += piece.nbytes
            if piece.nbytes == room:
                self._blocks.append(self._block.hexdigest())
                self._block = hashlib.sha256()

    def record(self) -> FileRecord:
        """Size and hashes of all that was written."""
        blocks = list(self._blocks)
        if self._size_bytes % BLOCK_BYTES:
            blocks.append(self._block.hexdigest())
        return FileRecord(self._size_bytes, self._whole.hexdigest(), tuple(blocks))


def record_of_bytes(data: bytes) -> FileRecord:
    """The record of a file that is small enough to be in memory."""
    blocks = [hashlib.sha256(data[at : at + BLOCK_BYTES]).hexdigest() for at in range(0, len(data), BLOCK_BYTES)]
    return FileRecord(len(data), hashlib.sha256(data).hexdigest(), tuple(blocks))


class VerifiedReader:
    """Byte ranges of one file whose blocks are compared with their recorded hashes. Keeps the last block.

    Args:
        fetch: the bytes ``[start, stop)`` of the file.
        path: of the file, for messages.
        record: what was written.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], *, path: str, record: FileRecord) -> None:
        self._fetch = fetch
        self.path = path
        self._record = record
        self._cached: tuple[int, memoryview] = (-1, memoryview(b""))

    def _blocks(self, first: int, stop: int) -> Iterator[memoryview]:
        """Blocks ``[first, stop)``, fetched in runs of neighbours."""
        if first < stop and first == self._cached[0]:
            yield self._cached[1]
            first += 1
        while first < stop:
            run_stop = min(stop, first + _BLOCKS_PER_FETCH)
            start = first * BLOCK_BYTES
            data = memoryview(self._fetch(start, min(run_stop * BLOCK_BYTES, self._record.size_bytes)))
            for index in range(first, run_stop):
                block = data[index * BLOCK_BYTES - start :][:BLOCK_BYTES]
                self._verify(index, block)
                if index == run_stop - 1:
                    self._cached = (index, memoryview(bytes(block)))
                yield block
            first = run_stop

    def _verify(self, index: int, block: memoryview) -> None:
        if hashlib.sha256(block).hexdigest() != self._record.block_sha256[index]:
            start = index * BLOCK_BYTES
            raise CheckpointError(
                "a file of the checkpoint is damaged: its content is not what was written",
                where=self.path,
                found=f"another SHA-256 in bytes [{start}, {start + block.nbytes})",
                expected=self._record.block_sha256[index],
                fix="go on from an older checkpoint, or restore the file",
            )

    def read(self, start: int, stop: int) -> bytearray:
        """The verified bytes ``[start, stop)``.

        Raises:
            CheckpointError: a block is damaged, or the range leaves the file.
        """
        if not 0 <= start <= stop <= self._record.size_bytes:
            raise CheckpointError(
                "a file of the checkpoint is shorter than its table of contents says",
                where=self.path,
                found=f"{self._record.size_bytes} bytes",
                expected=f"bytes [{start}, {stop})",
            )
        out = bytearray(stop - start)
        first = start // BLOCK_BYTES
        for index, block in enumerate(self._blocks(first, -(-stop // BLOCK_BYTES) if stop > start else first), first):
            block_start = index * BLOCK_BYTES
            low, high = max(start, block_start), min(stop, block_start + BLOCK_BYTES)
            out[low - start : high - start] = block[low - block_start : high - block_start]
        return out


@contextmanager
def open_verified(path: str, *, record: FileRecord) -> Iterator[VerifiedReader]:
    """The verified reader of one file, local or in a bucket.

    Raises:
        CheckpointError: the file is not there.
    """
    try:
        if storage.is_remote(path):
            yield VerifiedReader(
                lambda start, stop: storage.read_range(path, start=start, stop=stop), path=path, record=record
            )
            return
        with open(storage.local_path(path), "rb") as stream:
            yield VerifiedReader(lambda start, stop: _read_at(stream, start, stop), path=path, record=record)
    except FileNotFoundError:
        raise CheckpointError("a file of the checkpoint is missing", where=path) from None


def _read_at(stream: IO[bytes], start: int, stop: int) -> bytes:
    stream.seek(start)
    return stream.read(stop - start)
