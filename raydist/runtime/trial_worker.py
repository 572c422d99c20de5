"""What runs in each Ray Train worker of a sweep's trial."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import ray

from raydist.config.load import Recipe
from raydist.config.schema import RunConfig
from raydist.core.log import quiet_libraries, set_up_logging
from raydist.runtime.trial_stages import mark
from raydist.training.hooks import Hook, RunFacts
from raydist.training.lease import is_held
from raydist.training.session import run_attempt


class TrialHook(Hook):
    """Tells the board what rank 0 does, and asks it after each validation whether to go on."""

    def __init__(self, board: Any, *, name: str, num_steps: int, marks: dict[str, float]) -> None:
        self._board = board
        self._name = name
        self._num_steps = num_steps
        self._marks = marks

    def on_start(self, facts: RunFacts) -> None:
        """All is built."""
        mark(self._marks, "assembly")

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the line without waiting."""
        mark(self._marks, "steps")
        self._board.note.remote(self._name, step, dict(metrics))

    def on_checkpoint(self, step: int) -> None:
        """The last save belongs to the steps; that it is stored, to what follows."""
        mark(self._marks, "steps")

    def wants_stop(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Waits for the verdict on a validation."""
        wants_stop = ray.get(self._board.report.remote(self._name, step, dict(metrics), step == self._num_steps))
        mark(self._marks, "steps")
        return bool(wants_stop)


def trial_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """One attempt of a trial; after a worker's failure Ray calls this anew in fresh processes.

    Raises:
        RaydistError: a mistake of the user's, after which there is no other attempt.
    """
    marks: dict[str, float] = {}
    mark(marks, "workers")
    quiet_libraries()
    set_up_logging()
    recipe = Recipe(RunConfig.model_validate(payload["config"]), payload["config_hash"], payload["recipe"])
    hook = TrialHook(payload["board"], name=payload["name"], num_steps=recipe.config.training.num_steps, marks=marks)
    is_ours = functools.partial(is_held, payload["sweep_dir"], payload["lease"])
    outcome = run_attempt(recipe, run_dir=payload["run_dir"], hooks=[hook], driver_tracks=True, is_ours=is_ours)
    mark(marks, "export")
    return {"step": outcome.step, "metrics": outcome.metrics, "stopped": outcome.stopped, "marks": marks}
