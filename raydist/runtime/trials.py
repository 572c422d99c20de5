"""The trials of a sweep as Ray Tune sees them."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray import tune

from raydist.config.schema import RunConfig
from raydist.core.log import quiet_libraries
from raydist.runtime.ray_internals import ENVIRONMENT, spare_workers
from raydist.runtime.trial_stages import mark
from raydist.runtime.trial_train import TrainingThread

# A stopped trial ends by itself at its next report; a step and a checkpoint may lie before it.
_STOP_PATIENCE_S = 600.0


class TrainTrial(tune.Trainable):
    """A training run of its own Ray Train workers; each Tune iteration is one validation.

    The actor holds no CPU, and Tune uses it for one trial after the other.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Starts the first trial."""
        os.environ.update(config["environment"] | ENVIRONMENT)
        quiet_libraries()
        self._spare = spare_workers()
        self._launch(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Starts the next trial once the last one is over."""
        self._finish()
        self._launch(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Waits for the next validation, or for the end; asking for it is what lets the trial go on."""
        while True:
            kind, event = ray.get(self._board.next_event.remote(self._name))
            if kind == "end":
                return self._ended(event)
            self._last.update(event["metrics"], step=event["step"])
            if not event["is_last"]:
                return {**self._last, "trial_state": "running", "failure": ""}

    def cleanup(self) -> None:
        """Waits until the workers are gone."""
        try:
            self._finish()
        finally:
            self._spare.release()

    def _launch(self, config: dict[str, Any]) -> None:
        self._marks: dict[str, float] = {}
        mark(self._marks, "actor")
        self._name: str = config["name"]
        self._board: Any = ray.get_actor(config["board"])
        self._last: dict[str, Any] = {"step": 0}
        self._config_of_run = RunConfig.model_validate(config["config"])
        ray.get(self._board.begin.remote(self._name))
        passed_on = ("name", "config", "config_hash", "recipe", "run_dir", "sweep_dir", "lease")
        payload = {key: config[key] for key in passed_on}
        board, name = self._board, self._name
        self._training = TrainingThread(
            {**payload, "board": board},
            scaling=self._config_of_run.scaling,
            spare=self._spare if config["keep_workers"] else None,
            on_end=lambda outcome: ray.get(board.end.remote(name, outcome)),
        )

    def _ended(self, outcome: dict[str, Any]) -> dict[str, Any]:
        failure = outcome.get("failure", "")
        state = "failed" if failure else "stopped" if outcome["stopped"] else "finished"
        mark(self._marks, "release")
        marks = self._marks | outcome.get("marks", {})
        return {**self._last, "trial_state": state, "failure": failure, "marks": marks, "done": True}

    def _finish(self) -> None:
        """Ends what runs, at its next report.

        Raises:
            TimeoutError: it does not end; Tune then ends this actor, and Ray all that it made.
        """
        ray.get(self._board.stop.remote(self._name))
        if not self._training.join(timeout_s=_STOP_PATIENCE_S):
            raise TimeoutError(f"trial {self._name} does not end")
