"""Ray Tune as the engine of a sweep: it asks for trials, starts and stops their actors, and says what became of them."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from raydist.core import storage
from raydist.core.errors import RaydistError
from raydist.runtime.cluster import own_placement_groups

_UNLIMITED = 10**6  # the searcher says when there are no more trials
_NEWS_EVERY_S = 0.5
_CLEAR_PATIENCE_S = 10.0
_MAX_LOST_ACTORS = 3  # of one trial, e.g. with their nodes; it goes on from its newest checkpoint
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may end before it has measured anything
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # trials.jsonl is what a restart reads
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Pause(Enum):
    """Why there is no trial now."""

    FOR_ROOM = "the trials that run fill the cluster"
    FOR_GOOD = "there are no more"


class Trials(Protocol):
    """The driver's side of a sweep."""

    def propose(self) -> dict[str, Any] | Pause:
        """The configuration of the next trial's actor, with its ``name``."""

    def started(self, name: str, trial: Any) -> None:
        """A trial has its actor, for the first time or again; ``trial`` is what the scheduler knows it by."""

    def measured(self, name: str, result: Mapping[str, Any]) -> None:
        """A trial reported."""

    def ended(self, name: str, result: Mapping[str, Any], *, failure: str = "") -> None:
        """A trial finished, was stopped or failed."""

    def refresh(self) -> None:
        """Called about twice a second."""


def run_on_tune(
    trials: Trials,
    *,
    trainable: type[tune.Trainable],
    resources: dict[str, float],
    scheduler: TrialScheduler,
    folder: str,
) -> None:
    """Runs trials until there are no more; the cluster must be connected.

    Interrupted, it leaves no trial and no reserved place behind.

    Args:
        trials: gives them, and is told of them.
        trainable: what a trial's actor is.
        resources: of such an actor.
        scheduler: which trials to stop early.
        folder: for Tune's own files, of which nothing is read again.

    Raises:
        RaydistError: a trial could not be proposed.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    searcher = _Searcher(trials)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([resources])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=_UNLIMITED,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"start-{os.getpid()}",
            storage_path=storage.local_path(folder),
            callbacks=[_Callback(trials)],
            failure_config=tune.FailureConfig(max_failures=_MAX_LOST_ACTORS),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    others = own_placement_groups()
    try:
        tuner.fit()
    except BaseException:
        _take_down(but=others)
        raise
    if searcher.error is not None:
        raise searcher.error


def _take_down(*, but: Collection[str]) -> None:
    """Ends the trials and gives back all that they reserved; placement groups ``but`` are someone else's.

    Left to itself, a trial whose board or driver goes first takes its workers for failed and starts new ones, just while Ray
    ends the whole job; Ray 2.60 can then forget a worker that is being made, and its CPU with it. A placement group takes all
    that runs in it along: the trial's actor in Tune's, its workers in Train's.
    """
    end = time.monotonic() + _CLEAR_PATIENCE_S
    while time.monotonic() < end:
        left = own_placement_groups().keys() - but
        if not left:
            return
        for name in left:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))
        time.sleep(0.2)


def _trial_name(trial: Any) -> str:
    return str(trial.config["name"])


class _Searcher(Searcher):
    """Hands the driver's trials to Tune."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self._trials = trials
        self.error: RaydistError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes its own state, of which nothing is read again."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """The configuration of the next trial."""
        try:
            proposal = self._trials.propose()
        except RaydistError as error:
            self.error = error
            return Searcher.FINISHED
        if isinstance(proposal, Pause):
            return Searcher.FINISHED if proposal is Pause.FOR_GOOD else None
        return proposal

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The driver learns of it from the callback."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing to keep."""


class _Callback(tune.Callback):
    """Tells the driver what Tune sees."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._refreshed_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Now and then looks at the board."""
        if time.monotonic() - self._refreshed_at > _NEWS_EVERY_S:
            self._trials.refresh()
            self._refreshed_at = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Before its first result."""
        self._trials.started(_trial_name(trial), trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A validation, or the end."""
        self._trials.measured(_trial_name(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Finished, or stopped by the scheduler."""
        self._trials.ended(_trial_name(trial), trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's actor died."""
        last_words = str(trial.get_error() or "its actor died").strip().splitlines()[-1]
        self._trials.ended(_trial_name(trial), trial.last_result or {}, failure=last_words)
