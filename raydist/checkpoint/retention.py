"""Which checkpoints go when a new one is complete."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

from raydist.checkpoint.layout import (
    TRAINER,
    checkpoints_folder,
    has_marker,
    remove_checkpoint,
    step_folder,
    steps_on_storage,
)
from raydist.config.schema import KeepBestConfig
from raydist.core import storage
from raydist.core.errors import StorageError


def expired_steps(
    complete: Iterable[int],
    incomplete: Iterable[int],
    *,
    current: int,
    keep: int,
    keep_every_steps: int | None = None,
    costs: Mapping[int, float] | None = None,
) -> list[int]:
    """Steps to delete now that the checkpoint of step ``current`` is complete.

    Args:
        complete: steps with a marker, ``current`` among them.
        incomplete: steps without one. One save is in flight at a time, so they are what a killed attempt left.
        current: the step just saved; never deleted.
        keep: newest complete checkpoints to keep, at least 1.
        keep_every_steps: multiples of it are kept for good; None for none.
        costs: step -> what the best one has the least of; the earliest of equals is kept. Steps may be missing.

    Returns:
        The older complete ones beyond ``keep`` that are neither kept for good nor the best, every incomplete one, and
        every one beyond ``current``: those are of a course that the run left when it went back to an older checkpoint.
        Ascending.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the newest checkpoint")
    course = sorted(step for step in complete if step <= current)
    for_good = [step for step in course if keep_every_steps is not None and step % keep_every_steps == 0]
    best = sorted((cost, step) for step, cost in (costs or {}).items() if step in course)[:1]
    kept = {*course[-keep:], *for_good, *(step for _, step in best), current}
    return sorted({*complete, *incomplete} - kept)


def delete_expired(
    run_dir: str,
    *,
    current: int,
    keep: int,
    keep_every_steps: int | None = None,
    keep_best: KeepBestConfig | None = None,
) -> list[int]:
    """Applies :func:`expired_steps`, clears what interrupted deletions left, and returns the deleted steps."""
    steps = steps_on_storage(run_dir)
    complete = [step for step in steps if has_marker(run_dir, step)]
    incomplete = [step for step in steps if step not in complete]
    costs = {} if keep_best is None else _costs(run_dir, complete, keep_best)
    expired = expired_steps(
        complete, incomplete, current=current, keep=keep, keep_every_steps=keep_every_steps, costs=costs
    )
    for step in expired:
        remove_checkpoint(step_folder(run_dir, step))
    folder = checkpoints_folder(run_dir)
    for name in storage.list_names(folder):
        if ".deleted-" in name:
            storage.remove_tree(storage.join(folder, name))
    return expired


def _costs(run_dir: str, steps: Iterable[int], best: KeepBestConfig) -> dict[int, float]:
    """The metric of each checkpoint that was validated when it was saved; larger is worse."""
    costs = {}
    for step in steps:
        try:
            state = json.loads(storage.read_bytes(storage.join(step_folder(run_dir, step), TRAINER)))
            value = float(state["validation"][best.metric])
        except (StorageError, OSError, ValueError, KeyError, TypeError):
            continue  # not validated, or damaged: then it is not the best one
        if math.isfinite(value):
            costs[step] = -value if best.mode == "max" else value
    return costs
