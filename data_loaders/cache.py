"""The node's cache: plain shards in a local folder of limited size, named by the hash of their content.

There are no locks. Each process writes its own partial file and renames it, so any number of processes may fetch the
same shard; a process that sees another's partial grow waits for it instead of fetching twice. A file that is evicted
while a process has it mapped stays readable until it is unmapped.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from contextlib import suppress

from data_loaders.manifest import Manifest, ShardEntry
from data_loaders.shards import decompress_shard
from raydist.core import storage
from raydist.core.errors import CapacityError
from raydist.core.units import format_bytes

_SUFFIX = ".arrow"
_PARTIAL = ".partial-"
_FRESH_PARTIAL_S = 10.0
_STALE_PARTIAL_S = 600.0
_POLL_S = 0.05
DEFAULT_LIMIT_BYTES = 20 * 2**30


def default_cache_dir() -> str:
    """``$XDG_CACHE_HOME/raydist/shards``, or the same under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "raydist", "shards")


class NodeCache:
    """Plain shards on this node.

    Args:
        folder: local folder; several runs may share it.
        limit_bytes: the most that plain shards may take; the least recently used go first.
    """

    def __init__(self, folder: str | None = None, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.folder = storage.local_path(folder or default_cache_dir())
        self.limit_bytes = limit_bytes
        storage.make_folder(self.folder)
        self._in_use: set[str] = set()
        self._required_bytes: dict[str, int] = {}
        self._remove_stale_partials()

    def require(self, manifests: Iterable[Manifest], *, window_shards: int) -> None:
        """Refuses a limit under which a shuffle window of every dataset read through this cache does not fit at once.

        Raises:
            CapacityError: with the smallest limit that works.
        """
        for manifest in manifests:
            window = window_bytes(manifest, window_shards=window_shards)
            self._required_bytes[manifest.sha256] = max(window, self._required_bytes.get(manifest.sha256, 0))
        minimum = sum(self._required_bytes.values())
        if minimum > self.limit_bytes:
            raise CapacityError(
                "the node cache is too small for one shuffle window of each dataset",
                where="data.cache_limit",
                found=format_bytes(self.limit_bytes),
                expected=f"at least {format_bytes(minimum)} ({minimum} bytes)",
                fix="raise data.cache_limit or lower data.shuffle_window_shards",
            )

    def fetch(self, dataset: str, *, entry: ShardEntry) -> str:
        """The local path of a plain shard, fetched and checked if it is not here yet. Pair with :meth:`release`.

        Another process that needs room may evict it before it is opened; it is to be fetched again then.

        Raises:
            DataError: the shard is missing or damaged.
            CapacityError: the disk is full.
        """
        name = entry.raw_sha256 + _SUFFIX
        path = os.path.join(self.folder, name)
        self._in_use.add(name)
        if not self._holds(path, entry) and not self._other_process_fetches(path, entry):
            self._make_room(entry.raw_bytes)
            try:
                with storage.atomic_file(path) as partial:
                    decompress_shard(storage.join(dataset, entry.name), target=partial, entry=entry)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise CapacityError(
                    "the disk of the node cache is full",
                    where=self.folder,
                    found=error.strerror,
                    fix="lower data.cache_limit, free space, or move data.cache_dir",
                ) from None
        with suppress(FileNotFoundError):
            os.utime(path)
        return path

    def release(self, entry: ShardEntry) -> None:
        """Says that this process no longer needs a shard, which may then be evicted."""
        self._in_use.discard(entry.raw_sha256 + _SUFFIX)

    def _holds(self, path: str, entry: ShardEntry) -> bool:
        try:
            return os.path.getsize(path) == entry.raw_bytes
        except FileNotFoundError:
            return False

    def _other_process_fetches(self, path: str, entry: ShardEntry) -> bool:
        """Waits while another process's partial of this shard grows; True if the shard is there afterwards."""
        prefix = os.path.basename(path) + _PARTIAL
        while not self._holds(path, entry):
            ages = [age for name, _, age in self._files() if name.startswith(prefix)]
            if not ages or min(ages) > _FRESH_PARTIAL_S:
                return self._holds(path, entry)
            time.sleep(_POLL_S)
        return True

    def _files(self) -> list[tuple[str, int, float]]:
        """Name, size and age in seconds of each file; files may vanish meanwhile."""
        now = time.time()
        found = []
        with os.scandir(self.folder) as entries:
            for item in entries:
                try:
                    stat = item.stat()
                except FileNotFoundError:
                    continue
                found.append((item.name, stat.st_size, now - stat.st_mtime))
        return found

    def _make_room(self, needed_bytes: int) -> None:
        files = [item for item in self._files() if item[0].endswith(_SUFFIX)]
        total_bytes = sum(size for _, size, _ in files)
        for name, size, _ in sorted(files, key=lambda item: -item[2]):
            if total_bytes + needed_bytes <= self.limit_bytes:
                return
            if name not in self._in_use:
                _unlink(os.path.join(self.folder, name))
                total_bytes -= size

    def _remove_stale_partials(self) -> None:
        for name, _, age_s in self._files():
            if _PARTIAL in name and age_s > _STALE_PARTIAL_S:
                _unlink(os.path.join(self.folder, name))


def window_bytes(manifest: Manifest, *, window_shards: int) -> int:
    """The most that one shuffle window of a dataset takes on the node."""
    return sum(sorted((shard.raw_bytes for shard in manifest.shards), reverse=True)[:window_shards])


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
