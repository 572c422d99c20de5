"""The directory of a run: what lies where, who may use a name, and which attempt this is.

<output_dir>/<name>/
    config.yaml        the resolved configuration
    run.json           name, configuration hash, recipe
    metrics.jsonl      every metric that was logged, the source of truth
    checkpoints/       training state (raydist.checkpoint)
    export/            the trained model as a Hugging Face directory
    pictures/          loss curves and other PNGs
"""

from __future__ import annotations

from raydist.config.load import Recipe, changed_identity_keys, dump_yaml, read_resolved
from raydist.core import storage
from raydist.core.errors import ResumeError

CONFIG = "config.yaml"
RECORD = "run.json"
METRICS = "metrics.jsonl"
EXPORT = "export"
PICTURES = "pictures"


def run_dir_of(recipe: Recipe) -> str:
    """The run's directory, without making it."""
    assert recipe.config.name is not None
    return storage.join(storage.normalize(recipe.config.output_dir), recipe.config.name)


def prepare_run_dir(recipe: Recipe, *, resume: bool) -> str:
    """Makes the run's directory, or finds it; what is in it stays as it is until :func:`record_config`.

    Raises:
        ResumeError: the name is in use and ``resume`` was not asked for; or it was, and there is nothing to resume or the
            configuration differs in a key that decides what the run computes.
        StorageError: ``output_dir`` is a bucket that cannot be used.
    """
    run_dir = run_dir_of(recipe)
    record_path = storage.join(run_dir, RECORD)
    if not storage.exists(record_path):
        if resume:
            raise ResumeError("there is no such run to resume", where=run_dir, fix="start it without --resume")
        storage.make_folder(run_dir)
        record_config(recipe, run_dir)
        storage.write_json(
            record_path, {"name": recipe.config.name, "config_hash": recipe.config_hash, "recipe": recipe.path}
        )
        return run_dir
    if not resume:
        raise ResumeError(
            "this run name is in use",
            where=run_dir,
            fix=f"go on with it: add --resume\nor start another: name={recipe.config.name}-2",
        )
    if storage.read_json(record_path)["config_hash"] != recipe.config_hash:
        old = read_resolved(storage.join(run_dir, CONFIG)).config
        changed = changed_identity_keys(old, recipe.config)
        raise ResumeError(
            "the recipe differs from the run's own in keys that decide what it computes",
            where=", ".join(changed) or RECORD,
            found=f"configuration hash {recipe.config_hash[:12]}",
            expected=f"the one in {storage.join(run_dir, CONFIG)}",
            fix="undo the change, or give the run another name: name=...",
        )
    return run_dir


def record_config(recipe: Recipe, run_dir: str) -> None:
    """Keeps the configuration of this attempt. On a resume, only for the driver that holds the run."""
    storage.write_bytes(storage.join(run_dir, CONFIG), dump_yaml(recipe.config).encode())
