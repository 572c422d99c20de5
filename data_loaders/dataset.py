"""A prepared dataset directory, opened for reading."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from data_loaders.cache import NodeCache
from data_loaders.manifest import Manifest, read_manifest
from data_loaders.permutation import IntArray
from data_loaders.shards import Shard
from raydist.core import storage
from raydist.core.errors import DataError

if TYPE_CHECKING:
    from data_loaders.tokenizer import Tokenizer


class Dataset:
    """Shards of one dataset, fetched to the node when they are first read.

    Args:
        path: the dataset directory.
        manifest: its manifest.
        cache: where plain shards live.
    """

    def __init__(self, path: str, *, manifest: Manifest, cache: NodeCache) -> None:
        self.path = path
        self.manifest = manifest
        self.cache = cache
        self.max_open_shards = len(manifest.shards)
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def rows_per_shard(self, seq_len: int) -> IntArray:
        """Rows of ``seq_len`` (read with one token more) that each shard holds, int64 ``[num_shards]``.

        A shard's last ``tokens - 1 - rows * seq_len`` tokens are never a target; ``inspect`` reports them.
        """
        tokens = np.array([shard.tokens for shard in self.manifest.shards], dtype=np.int64)
        return np.maximum(tokens - 1, 0) // seq_len

    def require_rows(self, seq_len: int) -> None:
        """Refuses a ``seq_len`` for which no shard is long enough.

        Raises:
            DataError: naming the longest possible ``seq_len``.
        """
        longest = max((shard.tokens for shard in self.manifest.shards), default=0)
        if longest <= seq_len:
            raise DataError(
                "seq_len is too long for the data",
                where=self.path,
                found=f"seq_len={seq_len}, longest shard {longest} tokens",
                expected=f"data.seq_len at most {max(longest - 1, 0)}",
                fix="lower data.seq_len, or prepare the dataset with larger shards",
            )

    def shard(self, index: int) -> Shard:
        """One shard, memory-mapped. At most ``max_open_shards`` stay open; the least recently read is closed first.

        Whoever keeps a shard longer keeps its file mapped, and the space taken after the cache has unlinked it.
        """
        shard = self._open.get(index)
        if shard is not None:
            self._open.move_to_end(index)
            return shard
        while len(self._open) >= self.max_open_shards:
            closed = next(iter(self._open))
            del self._open[closed]
            self.cache.release(self.manifest.shards[closed])
        entry = self.manifest.shards[index]
        while shard is None:
            plain = self.cache.fetch(self.path, entry=entry)
            with suppress(FileNotFoundError):  # another process has just evicted it
                shard = Shard(plain, entry=entry)
        self._open[index] = shard
        return shard

    def tokenizer(self) -> Tokenizer:
        """The dataset's tokenizer, checked against the manifest.

        Raises:
            DataError: the file is missing or is not the one the data was prepared with.
        """
        from data_loaders.tokenizer import Tokenizer

        return Tokenizer.from_bytes(
            self.tokenizer_bytes(),
            where=self.path,
            special_ids=self.manifest.special_ids,
            kind=self.manifest.tokenizer_kind,
        )

    def tokenizer_bytes(self) -> bytes:
        """The content of ``tokenizer.json``, checked against the manifest."""
        import hashlib

        path = storage.join(self.path, self.manifest.tokenizer_file)
        try:
            content = storage.read_bytes(path)
        except FileNotFoundError:
            raise DataError("the dataset's tokenizer is missing", where=path, fix="prepare the dataset again") from None
        found = hashlib.sha256(content).hexdigest()
        if found != self.manifest.tokenizer_sha256:
            raise DataError(
                "the tokenizer is not the one that the data was prepared with",
                where=path,
                found=f"sha256 {found}",
                expected=f"sha256 {self.manifest.tokenizer_sha256}",
                fix="restore the file or prepare the dataset again",
            )
        return content


def open_dataset(path: str, *, cache: NodeCache) -> Dataset:
    """Opens a dataset directory (local or in a bucket); reads the manifest only.

    Raises:
        DataError: no dataset, another format, or a damaged manifest.
    """
    path = storage.normalize(path)
    return Dataset(path, manifest=read_manifest(path), cache=cache)
