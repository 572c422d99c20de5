"""DCP's two ends: saving stops at a list of tensors, loading starts at verified files.

DCP plans who holds and who needs which chunk, and its collectives must run in the main thread of every worker. So its
writer here only notes the planned chunks; a thread copies them to host memory and stores them, without any collective.
Until they are copied they must not change: forwards and backwards may run, updates may not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from raydist.checkpoint.files import open_verified
from raydist.checkpoint.layout import Checkpoint, shard_name
from raydist.checkpoint.metadata import ChunkPlace, chunk_name, metadata_to_json
from raydist.checkpoint.shards import ShardReader
from raydist.core import storage
from raydist.core.errors import CheckpointError


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Copying:
    """The time in which model and optimizer must stay as they are. One thread ends it, another waits for its end.

    Attributes:
        held_s: for how long the other one waited.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._waiting_since: float | None = None
        self.held_s = 0.0

    def end(self) -> None:
        """The copy is there."""
        with self._lock:
            if self._waiting_since is not None and not self._ended.is_set():
                self.held_s = time.monotonic() - self._waiting_since
            self._ended.set()

    def wait(self) -> None:
        """Returns when it is."""
        with self._lock:
            if not self._ended.is_set():
                self._waiting_since = time.monotonic()
        self._ended.wait()


class HostBuffers:
    """Host memory of one worker's part of a checkpoint, page-locked where the tensors come from a GPU.

    It is kept from save to save: getting fresh pages takes longer than copying into them, page-locked ones much longer.
    One save may use it at a time.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def copy(self, tensors: Mapping[str, Tensor], *, after: torch.cuda.Event | None = None) -> dict[str, Tensor]:
        """Copies of all tensors, valid until the next call.

        Args:
            tensors: of the host, or of one GPU.
            after: on a GPU, when the tensors have their values. They are copied beside what the GPU computes then.
        """
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        if after is not None and self._stream is None:
            self._stream = torch.cuda.Stream(device=after.device)
        with torch.cuda.stream(self._stream):
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return dict(self._buffers)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._buffers.get(name)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            return kept
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class HostStagingWriter(StorageWriter):
    """Collects this worker's chunks.

    Attributes:
        chunks: name in the shard file to the very tensor, filled by the save.
        table: the content of ``metadata.json``; on rank 0 only.
    """

    def __init__(self, *, rank: int) -> None:
        self._file = shard_name(rank)
        self.chunks: dict[str, Tensor] = {}
        self.table: dict[str, Any] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """A writer serves one save; nothing to reset."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is opened before the data is on the host."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """DCP's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """DCP's plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Notes the planned chunks and says where they will be."""
        results = []
        for item in plan.items:
            name = chunk_name(item.index.fqn, tuple(item.index.offset or ()))
            self.chunks[name] = planner.resolve_data(item).detach()
            results.append(WriteResult(item.index, self.chunks[name].nbytes, ChunkPlace(self._file, name)))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Keeps the table of all workers' chunks."""
        metadata.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
        self.table = metadata_to_json(metadata)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """DCP never makes this writer from a path."""
        return False

    def storage_meta(self) -> StorageMeta | None:
        """None: the table needs no ids."""
        return None


class VerifiedShardReader(StorageReader):
    """Reads the rows that this worker's shards need; every byte is verified."""

    def __init__(self, checkpoint: Checkpoint, *, metadata: Metadata) -> None:
        self._checkpoint = checkpoint
        self._metadata = metadata

    def reset(self, checkpoint_id: Any = None) -> None:
        """A reader serves one checkpoint; nothing to reset."""

    def read_metadata(self) -> Metadata:
        """The table that was read, as JSON, before."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Nothing to open before the plan is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """DCP's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """DCP's plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies the planned chunks into the model's and the optimizer's tensors.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        by_file: dict[str, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            place = self._metadata.storage_data[item.storage_index]
            by_file.setdefault(place.file, []).append((place.name, item))
        for file, items in by_file.items():
            if file not in self._checkpoint.files:
                raise CheckpointError("a shard file is not in the marker", where=self._checkpoint.folder, expected=file)
            path = storage.join(self._checkpoint.folder, file)
            with open_verified(path, record=self._checkpoint.files[file]) as reader:
                shard = ShardReader(reader)
                for name, item in sorted(items, key=lambda pair: shard.start(pair[0])):
                    _read_item(shard, name, item, planner)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """DCP never makes this reader from a path."""
        return False


def _read_item(shard: ShardReader, name: str, item: ReadItem, planner: LoadPlanner) -> None:
    target = planner.resolve_tensor(item).detach()
    if target.numel():
        if item.lengths:
            start, length = item.storage_offsets[0], item.lengths[0]
            source = shard.rows(name, start=start, stop=start + length)
            ends = [offset + extent for offset, extent in zip(item.storage_offsets, item.lengths, strict=True)]
            _require_inside(ends[1:], source.shape[1:], name=name)
            source = narrow_tensor_by_index(source, (0, *item.storage_offsets[1:]), item.lengths)
        else:
            source = shard.whole(name)
            _require_inside(target.shape, source.shape, name=name)
        target.copy_(source)
    planner.commit_tensor(item, target)


def _require_inside(wanted: Sequence[int], stored: Sequence[int], *, name: str) -> None:
    if len(wanted) != len(stored) or any(end > size for end, size in zip(wanted, stored, strict=True)):
        raise CheckpointError(
            "a tensor of a shard file has another shape than the table says",
            where=name,
            found=tuple(stored),
            expected=tuple(wanted),
        )
