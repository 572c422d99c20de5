"""Which checkpoints go when a new one is complete."""

from __future__ import annotations

from collections.abc import Iterable

from raydist.checkpoint.layout import (
    checkpoints_folder,
    has_marker,
    remove_checkpoint,
    step_folder,
    steps_on_storage,
)
from raydist.core import storage


def expired_steps(complete: Iterable[int], incomplete: Iterable[int], *, current: int, keep: int) -> list[int]:
    """Steps to delete now that the checkpoint of step ``current`` is complete.

    Args:
        complete: steps with a marker, ``current`` among them.
        incomplete: steps without one. One save is in flight at a time, so they are what a killed attempt left.
        current: the step just saved; never deleted.
        keep: complete checkpoints to keep, at least 1.

    Returns:
        The older complete ones beyond ``keep``, every incomplete one, and every one beyond ``current``: those are of a
        course that the run left when it went back to an older checkpoint. Ascending.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the newest checkpoint")
    course = sorted(step for step in complete if step <= current)
    kept = {*course[-keep:], current}
    return sorted({*complete, *incomplete} - kept)


def delete_expired(run_dir: str, *, current: int, keep: int) -> list[int]:
    """Applies :func:`expired_steps`, clears what interrupted deletions left, and returns the deleted steps."""
    steps = steps_on_storage(run_dir)
    complete = [step for step in steps if has_marker(run_dir, step)]
    expired = expired_steps(complete, [step for step in steps if step not in complete], current=current, keep=keep)
    for step in expired:
        remove_checkpoint(step_folder(run_dir, step))
    folder = checkpoints_folder(run_dir)
    for name in storage.list_names(folder):
        if ".deleted-" in name:
            storage.remove_tree(storage.join(folder, name))
    return expired
