"""What happens once per run, around all attempts: the directory, the MLflow run, and how it ended."""

from __future__ import annotations

import os
from collections.abc import Callable

from data_loaders.manifest import read_manifest
from raydist.checkpoint.layout import MARKER, Checkpoint, newest_complete
from raydist.config.load import Recipe
from raydist.config.schema import DatasetConfig
from raydist.core import storage
from raydist.core.errors import RaydistError
from raydist.core.log import get_logger
from raydist.core.retry import patience
from raydist.tracking.artifacts import CHECKPOINTS, ArtifactFile
from raydist.tracking.mlflow_runs import EndStatus, RunHandle, start_run
from raydist.tracking.params import flat_params
from raydist.tracking.record import DatasetInput
from raydist.training.lease import DriverLease
from raydist.training.run_dir import prepare_run_dir, record_config
from raydist.training.session import Outcome

RunAttempts = Callable[[Recipe, str], Outcome]
_BAD_END_PATIENCE_S = 60.0
_log = get_logger(__name__)


def conduct(recipe: Recipe, *, resume: bool, attempts: RunAttempts) -> tuple[str, RunHandle, Outcome]:
    """Prepares the run, lets ``attempts`` train it, and closes the MLflow run with the right status.

    Args:
        recipe: the resolved recipe.
        resume: go on with a run of this name instead of refusing it.
        attempts: trains to the end, on Ray or in this process; gets the recipe and the run directory.

    Returns:
        Run directory, MLflow handle, and what was reached.

    Raises:
        RaydistError: a mistake of the user's; the MLflow run is then marked as failed. ResumeError where another driver is
            training the run.
    """
    flat_params(recipe.config.model_dump(mode="json"))  # refuses a secret before anything is written
    datasets = dataset_inputs(recipe)
    run_dir = prepare_run_dir(recipe, resume=resume)
    with DriverLease(run_dir) as lease:
        if resume:
            record_config(recipe, run_dir)
        handle = _open_mlflow_run(recipe, run_dir, datasets=datasets, is_new=not resume)
        try:
            outcome = attempts(recipe, run_dir)
            point_to_checkpoint(handle, run_dir)
        except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into SystemExit until the run handles it itself
            _end_badly(handle, "KILLED", lease)
            raise
        except BaseException:
            _end_badly(handle, "FAILED", lease)
            raise
        if lease.is_held():
            handle.finish("KILLED" if outcome.interrupted else "FINISHED")
    return run_dir, handle, outcome


def _end_badly(handle: RunHandle, status: EndStatus, lease: DriverLease) -> None:
    """Closes the MLflow run if it can be done soon; what the user should see is why the run ended.

    A run that another driver has taken over is its to close.
    """
    if not lease.is_held():
        return
    try:
        with patience(total_s=_BAD_END_PATIENCE_S):
            handle.finish(status)
    except (RaydistError, OSError) as error:
        _log.warning("MLflow is not told that the run ended as %s: %s", status, error)


def point_to_checkpoint(handle: RunHandle, run_dir: str) -> None:
    """Lets MLflow know where the newest checkpoint lies; a trained run is not lost over it."""
    try:
        newest = None if handle.record is None else newest_complete(run_dir)
        if newest is not None:
            handle.point_to(checkpoint_files(newest), folder=CHECKPOINTS)
    except (RaydistError, OSError) as error:
        _log.warning("MLflow is not told where the newest checkpoint lies: %s", error)


def checkpoint_files(checkpoint: Checkpoint) -> list[ArtifactFile]:
    """Pointers to a checkpoint's files where they lie, by the sizes and hashes of its marker, and to the marker."""
    marker = storage.join(checkpoint.folder, MARKER)
    found = {name: (record.size_bytes, record.sha256) for name, record in checkpoint.files.items()}
    found[MARKER] = (storage.size_bytes(marker), storage.sha256(marker))
    place = f"{CHECKPOINTS}/{os.path.basename(checkpoint.folder)}"
    return [
        ArtifactFile(f"{place}/{name}", size, sha256, storage.join(checkpoint.folder, name))
        for name, (size, sha256) in sorted(found.items())
    ]


def _open_mlflow_run(recipe: Recipe, run_dir: str, *, datasets: list[DatasetInput], is_new: bool) -> RunHandle:
    """A refusal by MLflow gives the name of a new run back."""
    try:
        tags = {"raydist.config_hash": recipe.config_hash}
        return start_run(recipe.config, run_dir=run_dir, datasets=datasets, tags=tags)
    except RaydistError:
        if is_new:
            storage.remove_tree(run_dir)
        raise


def dataset_inputs(recipe: Recipe) -> list[DatasetInput]:
    """Reads the manifests, which also refuses a missing dataset before anything is written."""
    data = recipe.config.data
    return [_input(part, context="train") for part in data.train] + [
        _input(part, context="validation") for part in data.validation
    ]


def _input(part: DatasetConfig, *, context: str) -> DatasetInput:
    manifest = read_manifest(part.path)
    return DatasetInput(name=manifest.name, path=storage.normalize(part.path), digest=manifest.sha256, context=context)
