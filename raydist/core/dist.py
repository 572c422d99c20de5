"""The process group as the rest of the code sees it.

Training always runs inside a process group, also on one process: sharding, checkpoints and reductions then have one code
path. Ray Train has made the group before our code runs; ``torchrun`` and plain ``python`` get one here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

_GLOO_RELEASE_S = 0.05


@dataclass(frozen=True)
class Workers:
    """Who this process is among the workers of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on the one process that writes files and talks to the tracker."""
        return self.rank == 0


def current_workers() -> Workers:
    """Reads the initialised process group; CUDA if this process has a device, else CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    return Workers(torch_dist.get_rank(), local_rank, torch_dist.get_world_size(), device)


@contextmanager
def process_group(*, timeout_s: float = 1800.0) -> Iterator[Workers]:
    """Yields the workers of the run; creates the process group only where no one has.

    Under ``torchrun`` the environment names the peers; under plain ``python`` a group of one is made in memory.
    """
    if torch_dist.is_initialized():
        yield current_workers()
        return
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        torch_dist.init_process_group(backend, timeout=timeout)
    else:
        store = torch_dist.HashStore()
        torch_dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    try:
        yield current_workers()
    finally:
        leave_process_group()


def leave_process_group() -> None:
    """Destroys the process group once gloo's threads are done with the last collective.

    A gloo thread that drops the last reference to a tensor with a Python object takes Python's lock for it. Where the
    interpreter is already shutting down, that ends the process with SIGABRT, after everything went well. Sleeping hands the
    lock to such a thread.
    """
    time.sleep(_GLOO_RELEASE_S)
    torch_dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a small tensor over all ranks, in place and returned."""
    if torch_dist.is_initialized() and torch_dist.get_world_size() > 1:
        torch_dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """The elementwise maximum of a small tensor over all ranks, in place and returned."""
    if torch_dist.is_initialized() and torch_dist.get_world_size() > 1:
        torch_dist.all_reduce(values, op=torch_dist.ReduceOp.MAX)
    return values


def barrier() -> None:
    """Waits for all ranks; nothing on one."""
    if torch_dist.is_initialized() and torch_dist.get_world_size() > 1:
        torch_dist.barrier()


def broadcast_json(value: Any) -> Any:
    """Rank 0's small JSON-able value on every rank; other ranks may pass anything."""
    if not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
        return value
    device = torch.device("cuda") if torch_dist.get_backend() == "nccl" else torch.device("cpu")
    payload = list(json.dumps(value).encode()) if torch_dist.get_rank() == 0 else []
    length = torch.tensor([len(payload)], device=device)
    torch_dist.broadcast(length, src=0)
    data = torch.tensor(payload, dtype=torch.uint8, device=device) if payload else None
    if data is None:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    torch_dist.broadcast(data, src=0)
    return json.loads(bytes(data.tolist()))
