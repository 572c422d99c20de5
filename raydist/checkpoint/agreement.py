"""Errors that all workers see together: a worker that raises alone leaves the others waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.checkpoint.api import CheckpointException

from raydist.core.dist import broadcast_json, max_over_ranks
from raydist.core.errors import CheckpointError, RaydistError, StorageError


def on_any_worker(*flags: bool) -> list[bool]:
    """For each flag, whether any worker has it set."""
    if not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
        return list(flags)
    device = "cuda" if torch_dist.get_backend() == "nccl" else "cpu"
    return [bool(flag) for flag in max_over_ranks(torch.tensor([int(flag) for flag in flags], device=device)).tolist()]


def raise_together(error: Exception | None, *, where: str) -> None:
    """Raises on every worker if any worker has an error; its own one where it has one.

    Raises:
        CheckpointError: another worker has an error.
    """
    (failed,) = on_any_worker(error is not None)
    if error is not None:
        raise error
    if failed:
        raise CheckpointError("another worker could not do its part; its own log says why", where=where)


def on_first_worker(action: Callable[[], Any], *, where: str) -> Any:
    """The JSON-able value that rank 0 gets from ``action``, on every worker.

    Raises:
        StorageError: the action failed; the cause is named on every worker.
    """
    answer: dict[str, Any] = {}
    if not torch_dist.is_initialized() or torch_dist.get_rank() == 0:
        try:
            answer = {"value": action()}
        except Exception as error:
            answer = {"error": str(error)}
    answer = broadcast_json(answer)
    if "error" in answer:
        raise StorageError("the checkpoint storage cannot be used", where=where, found=answer["error"])
    return answer["value"]


def single_error(failure: CheckpointException, *, where: str) -> Exception:
    """One error out of DCP's one per worker: ours if any worker has one, else what went wrong, as a bug of ours.

    DCP's own exception is not an ``Exception``, so it would slip past every ordinary handler.
    """
    for error, _ in failure.failures.values():
        if isinstance(error, RaydistError):
            return error
    return RuntimeError(f"{where}: {failure}")
