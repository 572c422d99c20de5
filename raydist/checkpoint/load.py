"""Loading: the tensors of one checkpoint into a model and, if given, its optimizer, whatever the number of workers."""

from __future__ import annotations

import json
from typing import Any

from torch import nn
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from raydist.checkpoint.agreement import raise_together, single_error
from raydist.checkpoint.layout import METADATA, Checkpoint
from raydist.checkpoint.metadata import metadata_from_json
from raydist.checkpoint.staging import VerifiedShardReader
from raydist.checkpoint.state import allocate_optimizer_state, check_fits, model_tensors, optimizer_tensors
from raydist.core import storage
from raydist.core.errors import CheckpointError, RaydistError, StorageError


def _read_small_files(checkpoint: Checkpoint) -> tuple[Metadata, dict[str, Any]]:
    metadata: Metadata | None = None
    trainer_state: dict[str, Any] = {}
    error: RaydistError | None = None
    try:
        path = storage.join(checkpoint.folder, METADATA)
        metadata = metadata_from_json(json.loads(checkpoint.files[METADATA].read(path)))
        trainer_state = checkpoint.read_trainer_state()
    except (CheckpointError, StorageError) as damage:
        error = damage
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as unreadable:
        error = CheckpointError("the checkpoint cannot be read", where=checkpoint.folder, found=repr(unreadable))
    raise_together(error, where=checkpoint.folder)
    return metadata, trainer_state


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, *, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Overwrites the model (and the optimizer's state) in place; all workers call it together.

    Without an optimizer its files' bytes are not read: that is how a sampler loads a training checkpoint.

    Returns:
        The trainer's state, as it was given to the save.

    Raises:
        CheckpointError: a file is missing or damaged, on any worker; the model is then partly overwritten.
        ResumeError: the checkpoint belongs to another model; nothing was overwritten.
    """
    metadata, trainer_state = _read_small_files(checkpoint)
    tensors = model_tensors(model)
    if optimizer is not None:
        allocate_optimizer_state(model, optimizer, metadata=metadata)
        tensors |= optimizer_tensors(model, optimizer)
    check_fits(tensors, metadata=metadata, where=checkpoint.folder)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp_load(tensors, storage_reader=VerifiedShardReader(checkpoint, metadata=metadata), planner=planner)
    except CheckpointException as failure:
        raise single_error(failure, where=checkpoint.folder) from None
    return trainer_state
