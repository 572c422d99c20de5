"""Runs a function in several gloo processes; start-up is the cost, so one call should do many checks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.multiprocessing as torch_mp

from raydist.core.dist import Workers, leave_process_group, process_group


def run_workers(function: Callable[..., None], *args: Any, world_size: int, store_path: str) -> None:
    """Calls ``function(workers, *args)`` in ``world_size`` new processes; any failure fails the caller."""
    torch_mp.spawn(_worker, (world_size, store_path, function, args), nprocs=world_size)


def _worker(rank: int, world_size: int, store_path: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    store = torch_dist.FileStore(store_path, world_size)
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(Workers(rank, rank, world_size, torch.device("cpu")), *args)
    finally:
        leave_process_group()


def run_alone(function: Callable[..., None], *args: Any) -> None:
    """Calls ``function(workers, *args)`` here, in a process group of one."""
    with process_group() as workers:
        function(workers, *args)
