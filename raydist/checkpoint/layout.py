"""Where a checkpoint's files lie, and what makes it exist.

A run's checkpoints are ``RUN_DIR/checkpoints/step-00000100/``::

    rank-0003.safetensors   the tensor chunks that rank 3 held
    rank-0003.json          size and hashes of that file: rank 3 is done
    metadata.json           which chunk of which tensor is in which file
    trainer.json            step, counters, seeds, hashes: small and readable
    complete.json           written last: every file above with size and hashes

A folder without ``complete.json`` is not a checkpoint, whatever else it holds. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydist.checkpoint.files import FileRecord
from raydist.core import storage
from raydist.core.errors import CheckpointError, RaydistError, StorageError
from raydist.core.log import get_logger

MARKER = "complete.json"
METADATA = "metadata.json"
TRAINER = "trainer.json"
FORMAT_VERSION = 1

_STEP_FOLDER = re.compile(r"^step-(\d{8,})$")
_log = get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint.

    Attributes:
        folder: its path, local or in a bucket.
        step: optimizer steps that had been done.
        world_size: number of workers that wrote it.
        files: name to size and hashes of everything but the marker.
    """

    folder: str
    step: int
    world_size: int
    files: Mapping[str, FileRecord]

    def to_json(self) -> dict[str, Any]:
        """The content of the marker file."""
        return {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "files": {name: record.to_json() for name, record in self.files.items()},
        }

    def total_bytes(self) -> int:
        """Size of all files but the marker."""
        return sum(record.size_bytes for record in self.files.values())

    def read_trainer_state(self) -> dict[str, Any]:
        """The verified content of ``trainer.json``."""
        state: dict[str, Any] = json.loads(self.files[TRAINER].read(storage.join(self.folder, TRAINER)))
        return state


def checkpoints_folder(run_dir: str) -> str:
    """The folder that holds the checkpoints of a run."""
    return storage.join(run_dir, "checkpoints")


def step_folder(run_dir: str, step: int) -> str:
    """The folder of one checkpoint."""
    return storage.join(checkpoints_folder(run_dir), f"step-{step:08d}")


def shard_name(rank: int) -> str:
    """The file with the chunks of one rank."""
    return f"rank-{rank:04d}.safetensors"


def done_name(rank: int) -> str:
    """The file by which a rank says that its chunks are stored."""
    return f"rank-{rank:04d}.json"


def steps_on_storage(run_dir: str) -> list[int]:
    """Steps that have a folder, complete or not, ascending."""
    matches = (_STEP_FOLDER.match(name) for name in storage.list_names(checkpoints_folder(run_dir)))
    return sorted(int(match.group(1)) for match in matches if match)


def has_marker(run_dir: str, step: int) -> bool:
    """Whether the step's marker was written; says nothing about its files."""
    return storage.exists(storage.join(step_folder(run_dir, step), MARKER))


def read_checkpoint(folder: str) -> Checkpoint:
    """Reads the marker and compares the size of every file with it.

    Raises:
        CheckpointError: no marker, an unreadable one, or a file that is missing or has another size.
    """
    marker = storage.join(folder, MARKER)
    if not storage.exists(marker):
        raise CheckpointError("the checkpoint is incomplete", where=folder, expected=f"a {MARKER} file")
    try:
        content = json.loads(storage.read_bytes(marker))
        checkpoint = checkpoint_from_json(content, folder=folder)
    except (CheckpointError, StorageError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RaydistError) as error:
        raise CheckpointError("the completeness marker cannot be read", where=marker, found=repr(error)) from None
    for name, record in checkpoint.files.items():
        record.check_size(storage.join(folder, name))
    return checkpoint


def checkpoint_from_json(content: Mapping[str, Any], *, folder: str) -> Checkpoint:
    """The inverse of :meth:`Checkpoint.to_json`.

    Raises:
        RaydistError: another format, or a file name that leaves the folder.
        Exception: ``ValueError`` and its like for what is no marker.
    """
    marker = storage.join(folder, MARKER)
    if content["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            "the checkpoint has another format",
            where=marker,
            found=content["format_version"],
            expected=FORMAT_VERSION,
            fix="use the raydist version that wrote it",
        )
    files = {
        storage.safe_name(name, where=marker): FileRecord.from_json(record) for name, record in content["files"].items()
    }
    return Checkpoint(folder, int(content["step"]), int(content["world_size"]), files)


def complete_checkpoints(run_dir: str) -> list[Checkpoint]:
    """Every complete checkpoint of a run, oldest first; damaged ones are left out with a warning."""
    found = []
    for step in steps_on_storage(run_dir):
        if has_marker(run_dir, step):
            try:
                found.append(read_checkpoint(step_folder(run_dir, step)))
            except CheckpointError as error:
                _log.warning("checkpoint of step %d is passed over: %s", step, error)
    return found


def newest_complete(run_dir: str) -> Checkpoint | None:
    """The complete checkpoint with the highest step, or None if the run has none; reads no older marker than needed."""
    for step in reversed(steps_on_storage(run_dir)):
        if has_marker(run_dir, step):
            try:
                return read_checkpoint(step_folder(run_dir, step))
            except CheckpointError as error:
                _log.warning("checkpoint of step %d is passed over, trying an older one: %s", step, error)
    return None


def remove_checkpoint(folder: str) -> None:
    """Deletes a checkpoint so that it is invisible from the first moment on.

    A bucket deletes object by object, so the marker goes first; a local folder disappears by rename.
    """
    if storage.is_remote(folder):
        storage.remove_tree(storage.join(folder, MARKER))
    storage.remove_tree(folder)
