"""What preflight asks of each node: an actor that is pinned there and answers small questions."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata

from raydist.core import storage

_PACKAGES = ("ray", "torch", "raydist", "pyarrow", "safetensors")
_SHARED_MEMORY = "/dev/shm"
_REDUCED_FLOATS = 1 << 20


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself.

    Attributes:
        host: its name.
        versions: of Python, the packages that must agree, and a hash of raydist's source.
        missing_names: environment variables that were asked for and are not set.
        disk_free_bytes: where the cache and the spool lie.
        shared_memory_free_bytes: in /dev/shm.
    """

    host: str
    versions: dict[str, str]
    missing_names: tuple[str, ...]
    disk_free_bytes: int
    shared_memory_free_bytes: int


class NodeProbe:
    """Lives on one node for the time of a preflight."""

    def facts(self, *, names: Sequence[str], folders: Sequence[str]) -> NodeFacts:
        """Versions, environment and space; of several folders the one with the least space counts."""
        return NodeFacts(
            host=platform.node(),
            versions=versions(),
            missing_names=tuple(name for name in names if not os.environ.get(name)),
            disk_free_bytes=min(_free_bytes(folder) for folder in folders),
            shared_memory_free_bytes=_free_bytes(_SHARED_MEMORY),
        )

    def now(self) -> float:
        """The node's clock, Unix seconds."""
        return time.time()

    def try_storage(self, folder: str, *, shared: str, token: str) -> None:
        """Reads what another node wrote to ``shared``, then writes, reads and deletes a file of its own.

        Raises:
            RuntimeError: the folder is not shared, or does not keep what is written.
            Exception: whatever the storage says.
        """
        try:
            seen = storage.read_bytes(shared).decode()
        except FileNotFoundError:
            seen = ""
        if seen != token:
            raise RuntimeError(f"what the head wrote to {folder} is not there: every node must reach the same files")
        write_read_delete(folder)

    def try_mlflow(self, uri: str) -> None:
        """Reads with what this node has of credentials, by the name that it has for the server.

        Raises:
            TrackingError: the server cannot be reached from here, or refuses.
        """
        read_mlflow(uri)

    def read_dataset(self, path: str, *, seq_len: int, cache_dir: str | None) -> str:
        """The hash of the dataset's manifest, as this node reads it.

        Raises:
            DataError: it cannot be read from here, or no shard is long enough for ``seq_len``.
        """
        from data_loaders.cache import NodeCache
        from data_loaders.dataset import open_dataset

        dataset = open_dataset(path, cache=NodeCache(cache_dir))
        dataset.require_rows(seq_len)
        return dataset.manifest.sha256

    def rendezvous(self) -> str:
        """``tcp://host:port`` at which this node can be first of a process group."""
        import socket

        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def all_reduce(self, *, rank: int, world_size: int, url: str, timeout_s: float) -> float:
        """Sums 4 MiB over all nodes by gloo; returns the seconds that the sum took.

        Raises:
            RuntimeError: the nodes do not reach each other, or the sum is wrong.
        """
        import torch
        import torch.distributed as dist

        limit = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size, timeout=limit)
        try:
            values = torch.full((_REDUCED_FLOATS,), float(rank + 1))
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(values)
            seconds = time.perf_counter() - started
        finally:
            dist.destroy_process_group()
        expected = world_size * (world_size + 1) / 2
        if not bool((values == expected).all()):
            raise RuntimeError(f"the sum is {float(values[0])} instead of {expected}")
        return seconds


def versions() -> dict[str, str]:
    """What must be the same everywhere, by name; a package that is not installed as one is ``not installed``."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "raydist source": _source_hash()}


def read_mlflow(uri: str) -> None:
    """The cheapest read of MLflow's API: its ``/health`` also answers those whom the API refuses.

    Raises:
        TrackingError: the server cannot be reached, or refuses.
    """
    from raydist.tracking.server import connect, explained

    with explained(uri):
        connect(uri).search_experiments(max_results=1)


def write_read_delete(folder: str) -> None:
    """Leaves nothing behind.

    Raises:
        RuntimeError: what was read is not what was written.
        Exception: whatever the storage says.
    """
    path = storage.join(folder, f".preflight-{uuid.uuid4().hex}", "probe")
    content = uuid.uuid4().bytes
    try:
        storage.write_bytes(path, content)
        if storage.read_bytes(path) != content:
            raise RuntimeError(f"{folder} does not return what was written")
    finally:
        storage.remove_tree(os.path.dirname(path))


def _source_hash() -> str:
    from data_loaders import manifest

    digest = hashlib.sha256()
    for root in (os.path.dirname(os.path.dirname(storage.__file__)), os.path.dirname(manifest.__file__)):
        for name in sorted(name for name in storage.list_files(root) if name.endswith(".py")):
            digest.update(name.encode() + b"\0" + storage.read_bytes(os.path.join(root, name)) + b"\0")
    return digest.hexdigest()[:12]


def _free_bytes(folder: str) -> int:
    """Of the disk that the folder is on, or will be on once it is made."""
    path = storage.local_path(folder)
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free
