"""From a trial's parameters to the configuration of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_loaders.manifest import read_manifest
from raydist.config.load import Recipe, with_absolute_paths
from raydist.config.schema import RunConfig, ScalingConfig
from raydist.config.sweep import Sweep
from raydist.config.sweep_values import Choice
from raydist.core import storage
from raydist.core.errors import ConfigError
from raydist.evaluation.sweep_records import TrialRecord
from raydist.runtime.bookkeeper import Bookkeeper
from raydist.runtime.sweep_capacity import Nodes, require_slots
from raydist.runtime.sweep_dir import SweepDir
from raydist.runtime.trials import TrainTrial
from raydist.tracking.mlflow_runs import resolve_uri
from raydist.training.data import token_ids
from raydist.training.run_dir import RECORD, prepare_run_dir, record_config

_ACTOR_MEMORY_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class TrainTrials:
    """The trials of a sweep that trains.

    Attributes:
        sweep: the sweep.
        folder: its directory.
        books: keeps the trials' MLflow runs.
    """

    sweep: Sweep
    folder: SweepDir
    books: Bookkeeper
    trainable = TrainTrial

    @property
    def base(self) -> RunConfig:
        """The recipe that all trials start from."""
        assert self.sweep.recipe is not None
        return self.sweep.recipe.config

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Refuses what is no recipe.

        Raises:
            ConfigError: naming the key that does not fit.
        """
        self.sweep.resolve_trial(parameters)

    def share(self, parameters: Mapping[str, Any], nodes: Nodes) -> float:
        """The part of the cluster that a trial takes.

        Raises:
            CapacityError: it does not fit.
        """
        scaling = self.sweep.resolve_trial(parameters).config.scaling
        return scaling.num_workers / require_slots(scaling, nodes, where=f"{self.sweep.path}: scaling")

    def recipe(self, index: int, parameters: Mapping[str, Any]) -> Recipe:
        """The trial's recipe, with its name, its place and the tracking server of the sweep.

        Trials have the recipe's seed, hence the same data order and the same noise, unless the sweep varies them.
        """
        resolved = self.sweep.resolve_trial(parameters)
        target = resolve_uri(
            self.base.tracking.mlflow_uri, output_dir=self.base.output_dir, experiment=self.base.tracking.experiment
        )
        config = resolved.config
        tracking = config.tracking.model_copy(update={"mlflow_uri": target.uri if target else "none"})
        changes = {"name": self.folder.trial_name(index), "output_dir": self.folder.path, "tracking": tracking}
        return Recipe(with_absolute_paths(config.model_copy(update=changes)), resolved.config_hash, resolved.path)

    def resources(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        """Of the trial's own actor, which waits most of the time: Tune wants some, and the workers need every CPU."""
        return {"memory": _ACTOR_MEMORY_BYTES}

    def prepare(self, index: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Makes the trial's run directory, or finds the one it has, and says what its actor needs to know."""
        recipe = self.recipe(index, parameters)
        known = storage.exists(storage.join(self.folder.trial_dir(index), RECORD))
        run_dir = prepare_run_dir(recipe, resume=known)
        if known:
            record_config(recipe, run_dir)
        self.books.begin(recipe, run_dir)
        return {
            "config": recipe.config.model_dump(mode="json"),
            "config_hash": recipe.config_hash,
            "recipe": recipe.path,
            "run_dir": run_dir,
            "sweep_dir": self.folder.path,
            "lease": self.folder.holder,
            "keep_workers": not _varies_the_process(self.sweep),
        }

    def ended(self, record: TrialRecord) -> None:
        """Closes the trial's books."""
        if record.run_dir is not None:
            self.books.end(record.name, record.run_dir, state=record.state)

    def rebook(self, index: int, record: TrialRecord) -> None:
        """Opens the trial's books once more, or for the first time, and closes them."""
        if record.run_dir is not None:
            self.books.begin(self.recipe(index, record.parameters), record.run_dir)
            self.ended(record)


def _varies_the_process(sweep: Sweep) -> bool:
    """Whether trials differ in where their workers run or in what a process keeps; they share no workers then."""
    for key, distribution in sweep.config.space.items():
        if key.split(".")[0] == "scaling" or key == "training.num_threads":
            return True
        if key == "training" and isinstance(distribution, Choice):
            return any("num_threads" in value for value in distribution.choice)
    return False


def require_room(sweep: Sweep, nodes: Nodes) -> None:
    """Refuses a sweep of which a trial fits nowhere.

    Raises:
        CapacityError: with the numbers.
    """
    for scaling in _scalings(sweep):
        require_slots(scaling, nodes, where=f"{sweep.path}: scaling")


def check_sweep(sweep: Sweep) -> None:
    """Refuses a sweep whose trials cannot be trained or ranked.

    Raises:
        RaydistError: see :meth:`raydist.config.sweep.Sweep.validate_trials`; or a dataset is missing, or trials are elastic.
    """
    assert sweep.recipe is not None
    data = sweep.recipe.config.data
    manifests = [read_manifest(part.path) for part in (*data.train, *data.validation)]
    sweep.validate_trials(ids=token_ids(manifests[0]))
    for scaling in _scalings(sweep):
        if scaling.min_workers not in (None, scaling.num_workers):
            raise ConfigError(
                "trials are not elastic: while a node is missing fewer of them run at a time, each on all its workers",
                where="scaling.min_workers",
                found=f"{scaling.min_workers}, with scaling.num_workers={scaling.num_workers}",
                expected="null",
                fix="for this sweep alone: scaling.min_workers=null behind the command, or under overrides in the sweep file",
            )


def _scalings(sweep: Sweep) -> list[ScalingConfig]:
    """Those that the trials are known to have, each once."""
    assert sweep.recipe is not None
    scalings = [sweep.recipe.config.scaling]
    if any(key.split(".")[0] == "scaling" for key in sweep.config.space):
        scalings = [sweep.resolve_trial(trial).config.scaling for trial in sweep.foreseen_trials()]
    return list(dict.fromkeys(scalings))
