"""What happens once per run, around all attempts: the directory, the MLflow run, and how it ended."""

from __future__ import annotations

from collections.abc import Callable

from data_loaders.manifest import read_manifest
from raydist.config.load import Recipe
from raydist.config.schema import DatasetConfig
from raydist.core import storage
from raydist.core.errors import RaydistError
from raydist.tracking.mlflow_runs import RunHandle, start_run
from raydist.tracking.record import DatasetInput
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import Outcome

RunAttempts = Callable[[Recipe, str], Outcome]


def conduct(recipe: Recipe, *, resume: bool, attempts: RunAttempts) -> tuple[str, RunHandle, Outcome]:
    """Prepares the run, lets ``attempts`` train it, and closes the MLflow run with the right status.

    Args:
        recipe: the resolved recipe.
        resume: go on with a run of this name instead of refusing it.
        attempts: trains to the end, on Ray or in this process; gets the recipe and the run directory.

    Returns:
        Run directory, MLflow handle, and what was reached.

    Raises:
        RaydistError: a mistake of the user's; the MLflow run is then marked as failed.
    """
    datasets = dataset_inputs(recipe)
    run_dir = prepare_run_dir(recipe, resume=resume)
    handle = _open_mlflow_run(recipe, run_dir, datasets=datasets, is_new=not resume)
    try:
        outcome = attempts(recipe, run_dir)
    except KeyboardInterrupt:
        handle.finish("KILLED")
        raise
    except BaseException:
        handle.finish("FAILED")
        raise
    handle.finish("FINISHED")
    return run_dir, handle, outcome


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
