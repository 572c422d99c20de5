"""The points of a save at which a process is killed, in the order in which a save passes them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from raydist.checkpoint import checkpointer as checkpointer_module
from raydist.checkpoint import files
from raydist.checkpoint import store as store_module
from raydist.checkpoint.checkpointer import Checkpointer
from raydist.core import storage
from raydist.tracking.mlflow_tracker import RunTracker

Filter = Callable[..., bool]


def _path_ends_in(name: str, *, argument: int = 0) -> Filter:
    return lambda *args, **kwargs: str(args[argument]).endswith(name)


def _nth_call(number: int) -> Filter:
    calls = iter(range(1, 1_000_000))
    return lambda *args, **kwargs: next(calls) == number


def _always(*args: object, **kwargs: object) -> bool:
    return True


# name -> (owner, function before which it lies, which of its calls)
POINTS: dict[str, tuple[Any, str, Filter]] = {
    "the save is asked for": (Checkpointer, "_claim", _always),
    "the folder is claimed": (Checkpointer, "_stage", _always),
    "the save is planned": (Checkpointer, "_store", _always),
    "the copy is in host memory": (store_module, "_store_shard", _always),
    "the spool file is open": (files.HashingWriter, "write", _nth_call(1)),
    "the spool file is half written": (files.HashingWriter, "write", _nth_call(20)),
    "the shard is spooled": (storage, "upload_file", _path_ends_in(".safetensors")),
    "the shard is stored": (storage, "write_json", _path_ends_in("rank-0000.json")),
    "the worker said so": (storage, "write_bytes", _path_ends_in("metadata.json")),
    "the table is stored": (storage, "write_bytes", _path_ends_in("trainer.json")),
    "the trainer's state is stored": (RunTracker, "publish", _always),
    "the metrics are stored": (storage, "write_json", _path_ends_in("complete.json")),
    "the marker is stored": (checkpointer_module, "delete_expired", _always),
    "an old marker is deleted": (storage, "remove_tree", _path_ends_in("04")),
}


def arm(point: str, *, step: int) -> None:
    """SIGKILL to this process when the save of ``step`` passes ``point``."""
    owner, name, concerns = POINTS[point]
    save, reached = Checkpointer.save, getattr(owner, name)
    saving: list[int] = []

    def watched_save(self: Checkpointer, at: int, **kwargs: Any) -> Any:
        self.wait()  # what follows belongs to this save alone
        saving[:] = [at]
        return save(self, at, **kwargs)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if saving == [step] and concerns(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        return reached(*args, **kwargs)

    Checkpointer.save = watched_save  # type: ignore[method-assign]
    setattr(owner, name, deadly)
