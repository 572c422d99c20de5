"""What runs in each Ray Train worker of a sweep's trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from raydist.config.load import Recipe
from raydist.config.schema import RunConfig
from raydist.core.errors import RaydistError
from raydist.core.log import quiet_libraries, set_up_logging
from raydist.training.hooks import Hook
from raydist.training.session import run_attempt


class TrialHook(Hook):
    """Tells the board what rank 0 does, and asks it after each validation whether to go on."""

    def __init__(self, board: Any, *, name: str, num_steps: int) -> None:
        self._board = board
        self._name = name
        self._num_steps = num_steps

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the line without waiting."""
        self._board.note.remote(self._name, step, dict(metrics))

    def wants_stop(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Waits for the verdict on a validation."""
        return ray.get(self._board.report.remote(self._name, step, dict(metrics), step == self._num_steps))


def trial_worker(payload: dict[str, Any]) -> dict[str, Any] | None:
    """One attempt of a trial; after a worker's failure Ray calls this anew in fresh processes.

    A user's mistake is left on the board, so that the attempt that Ray starts after it ends at once.
    """
    quiet_libraries()
    set_up_logging()
    board, name = payload["board"], payload["name"]
    if ray.get(board.failure.remote(name)) is not None:
        return None
    recipe = Recipe(RunConfig.model_validate(payload["config"]), payload["config_hash"], payload["recipe"])
    hook = TrialHook(board, name=name, num_steps=recipe.config.training.num_steps)
    try:
        outcome = run_attempt(recipe, run_dir=payload["run_dir"], hooks=[hook], driver_tracks=True)
    except RaydistError as error:
        ray.get(board.set_failure.remote(name, str(error)))
        raise
    return {"step": outcome.step, "metrics": outcome.metrics, "stopped": outcome.stopped}
