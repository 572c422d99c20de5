"""From what a user types to a model's directory."""

from __future__ import annotations

from raydist.config.base import nearest_hint
from raydist.core import storage
from raydist.core.errors import ConfigError

_EXPORT = "export"


def find_model_dir(run_or_dir: str, *, output_dir: str) -> str:
    """The Hugging Face directory that is meant.

    Args:
        run_or_dir: such a directory, a run's directory (its ``export`` is taken), or a run's name.
        output_dir: where runs are looked up by name.

    Raises:
        ConfigError: nothing there, or the run has not exported a model yet; lists the runs that have one.
    """
    named_run = storage.join(output_dir, run_or_dir)
    for candidate in (run_or_dir, storage.join(run_or_dir, _EXPORT), storage.join(named_run, _EXPORT)):
        if storage.exists(storage.join(candidate, "config.json")):
            return storage.normalize(candidate)
    for run in (run_or_dir, named_run):
        if storage.exists(storage.join(run, "config.yaml")):
            raise ConfigError(
                "the run has no exported model yet",
                where=storage.normalize(run),
                expected=f"{_EXPORT}/config.json, written when training ends",
                fix="finish it: raydist train ... --resume",
            )
    runs = [
        name
        for name in storage.list_names(output_dir)
        if storage.exists(storage.join(output_dir, name, _EXPORT, "config.json"))
    ]
    raise ConfigError(
        "no model under this name",
        where=run_or_dir,
        expected="a run's name or directory, or a Hugging Face directory; finished runs: "
        + (", ".join(runs) or "none"),
        fix=nearest_hint(run_or_dir, runs) or f"check --output-dir (now {output_dir})",
    )
