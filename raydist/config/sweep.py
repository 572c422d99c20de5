"""The sweep file: a recipe or a trained model, what to vary, how to search, and what counts.

Later wins: the file <- its overlay (``+debug``) <- ``key=value``. A word whose first key is one of the sweep's own
(``search.num_trials=16``, ``budget.num_steps=200``) changes the sweep; any other is a key of the recipe, for all trials.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from raydist.config.base import nearest_hint, validated
from raydist.config.load import Recipe, as_overrides, load_recipe, merge, parse_overrides, read_yaml
from raydist.config.schema import SamplingConfig
from raydist.config.sweep_fairness import check_comparable, check_metric, label, related_key
from raydist.config.sweep_schema import SweepConfig, check_keys
from raydist.config.sweep_space import Space, lookup, nested
from raydist.config.sweep_values import Choice
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds

_MOST_GRID_TRIALS = 2000


@dataclass(frozen=True)
class Sweep:
    """A sweep file, resolved.

    Attributes:
        config: with ``name`` set.
        path: the sweep file.
        recipe_path: the recipe's file; None for a sweep over samplers.
        recipe: the recipe that trials start from, with ``overrides`` and ``budget.num_steps``; None likewise.
        sha256: identifies trials and metric: equal hashes may resume each other. Neither the name nor the limit on wall-clock
            time is part of it.
    """

    config: SweepConfig
    path: str
    recipe_path: str | None
    recipe: Recipe | None
    sha256: str

    @property
    def name(self) -> str:
        """Of the sweep's directory."""
        return self.config.name or ""

    @property
    def space(self) -> Space:
        """What is varied, over the values that all trials share."""
        if self.recipe is not None:
            return Space(self.config.space, self.recipe.config.model_dump(mode="json"))
        return Space(self.config.space, self._shared())

    def grid(self) -> list[dict[str, Any]]:
        """All trials of a grid, each a mapping from key to value; the last key varies fastest.

        Raises:
            ConfigError: a key has a range instead of a list, or there are too many.
        """
        for key, distribution in self.config.space.items():
            if not isinstance(distribution, Choice):
                raise ConfigError(
                    "a grid needs lists",
                    where=f"space.{key}",
                    found=type(distribution).__name__,
                    fix=f"list the values, or search: {{name: random, num_trials: 20}} in {self.path}",
                )
        trials: list[dict[str, Any]] = []
        for trial in self.space.grid():
            if len(trials) == _MOST_GRID_TRIALS:
                raise ConfigError(
                    f"the grid has more than {_MOST_GRID_TRIALS} trials",
                    where="space",
                    fix="search: {name: random, num_trials: 100}",
                )
            trials.append(trial)
        return trials

    def random_trials(self) -> list[dict[str, Any]]:
        """All trials of a random search; trial i is the same whatever the others are."""
        search = self.config.search
        return [self.space.random_trial(index, seed=search.seed) for index in range(search.num_trials or 0)]

    def foreseen_trials(self) -> list[dict[str, Any]]:
        """All trials of a grid or a random search; of a search with ranges also those at each end and each listed value.

        Raises:
            ConfigError: as :meth:`grid`.
        """
        if self.config.search.name == "grid":
            return self.grid()
        return self.space.covering() + (self.random_trials() if self.config.search.name == "random" else [])

    def trial_overrides(self, trial: Mapping[str, Any]) -> list[str]:
        """What ``raydist train RECIPE`` needs to train the trial: ``key=value`` words, the shared ones first."""
        values = self._shared()
        for key, value in trial.items():
            values = merge(values, nested(key, value))
        return as_overrides(values)

    def resolve_trial(self, trial: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial.

        Raises:
            ConfigError: naming the key of the space, or of the overrides, that does not fit.
        """
        assert self.recipe_path is not None
        try:
            return load_recipe(self.recipe_path, self.trial_overrides(trial))
        except ConfigError as error:
            raise self._located(error, trial) from None

    def sampling_of(self, trial: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> SamplingConfig:
        """The ``sampling`` section of a trial.

        Args:
            trial: of a sweep over samplers.
            defaults: the section that the checkpoint came with.

        Raises:
            ConfigError: as :meth:`resolve_trial`.
        """
        values = merge({"sampling": dict(defaults or {})}, self._shared())
        for key, value in trial.items():
            values = merge(values, nested(key, value))
        try:
            return validated(SamplingConfig, values["sampling"], prefix="sampling")
        except ConfigError as error:
            raise self._located(error, trial) from None

    def validate_trials(self, *, ids: TokenIds | None = None, sampling: Mapping[str, Any] | None = None) -> None:
        """Resolves the trials that can be foreseen: all but those that ``tpe`` chooses as it learns.

        Args:
            ids: of the dataset, to build the objectives for; bytes by default.
            sampling: of a sweep over samplers, the section that the checkpoint came with.

        Raises:
            ConfigError: a trial that cannot be, a condition that never holds, or trials that cannot be ranked.
        """
        self.space.check_conditions(where="space")
        trials = self.foreseen_trials()
        if self.recipe is None:
            for trial in trials:
                self.sampling_of(trial, defaults=sampling)
            return
        configs = [self.resolve_trial(trial).config for trial in trials]
        check_comparable(configs, keys=list(self.config.space))
        for metric in self.config.metric:
            check_metric(metric, trials, configs, ids=ids)
        self._check_scheduler([config.training.num_steps for config in configs])

    def _check_scheduler(self, num_steps: Sequence[int]) -> None:
        """Early stopping compares trials at equal steps, and needs a validation to compare."""
        scheduler, recipe = self.config.scheduler, self.recipe
        if scheduler.name == "none" or recipe is None:
            return
        if len(set(num_steps)) > 1:
            raise ConfigError(
                "trials of different lengths cannot be stopped at equal steps",
                where="scheduler.name",
                found=f"{scheduler.name}, with training.num_steps from {min(num_steps)} to {max(num_steps)}",
                fix="scheduler: {name: none}, or the same number of steps for all",
            )
        first = recipe.config.training.validate_every_steps or 0
        grace = scheduler.grace_steps or first
        if not first <= grace < num_steps[0]:
            raise ConfigError(
                "no trial could be stopped early" if grace >= num_steps[0] else "trials would be stopped unmeasured",
                where="scheduler.grace_steps",
                found=grace,
                expected=f"from the first validation, step {first}, to before the last step, {num_steps[0]}",
            )

    def _shared(self) -> dict[str, Any]:
        return _shared_values(self.config)

    def _located(self, error: ConfigError, trial: Mapping[str, Any]) -> ConfigError:
        """The error of a recipe as one of this file's key."""
        key = related_key(error.where or "", list(trial))
        shared = related_key(error.where or "", list(self.config.overrides))
        words = ", ".join(f"{name}={label(value)}" for name, value in trial.items())
        if key is not None:
            where = f"{self.path}: space.{key}"
        else:
            where = f"{self.path}: overrides.{shared}" if shared else f"{self.path}: space"
        what = f"{error.what}, at {error.where}" if error.where and error.where != key else error.what
        return ConfigError(
            f"a trial does not fit its recipe: {what}",
            where=where,
            found=f"{error.found} (trial {words})" if error.found else f"trial {words}",
            expected=error.expected,
            fix=error.fix,
        )


def load_sweep(path: str, overrides: Sequence[str] = (), *, overlay: str | None = None) -> Sweep:
    """Reads a sweep file.

    Args:
        path: a YAML file.
        overrides: ``key=value`` words, for the sweep or for the recipe of all trials.
        overlay: a name of the file's ``overlays``.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, a value does not fit, the space is empty, the metric
            is unfair by its name, or the recipe cannot be loaded. What needs the trials is checked by
            :meth:`Sweep.validate_trials`.
    """
    if not os.path.isfile(path):
        raise ConfigError(
            "no such sweep", where=path, expected="a YAML file", fix="ls sweeps shows the sweeps that come along"
        )
    raw = _with_overlay(read_yaml(path), overlay, path=path)
    own, of_recipe = _parted(overrides)
    raw = merge(raw, parse_overrides(own))
    raw["overrides"] = _with_recipe_keys(_mapping(raw, "overrides", where=path), of_recipe)
    try:
        config = validated(SweepConfig, raw)
        check_keys(config)
    except ConfigError as error:
        raise error.moved_to(f"{path}: {error.where}" if error.where else path) from None
    recipe_path = None if config.recipe is None else _find_recipe(config.recipe, path)
    sweep = Sweep(config, path=path, recipe_path=recipe_path, recipe=None, sha256="")
    if recipe_path is not None:
        sweep = replace(sweep, recipe=sweep.resolve_trial({}))
    sha256 = _sha256(sweep)
    stem = os.path.splitext(os.path.basename(path))[0] + (f"-{overlay}" if overlay else "")
    name = config.name or f"{stem}-{sha256[:8]}"
    return replace(sweep, config=config.model_copy(update={"name": name}), sha256=sha256)


def dump_sweep(sweep: Sweep) -> str:
    """The resolved sweep as YAML, readable by :func:`load_sweep`."""
    return OmegaConf.to_yaml(OmegaConf.create(sweep.config.model_dump(mode="json")))


def _with_overlay(raw: dict[str, Any], name: str | None, *, path: str) -> dict[str, Any]:
    """The file with one of its overlays; of the space and the overrides an overlay replaces whole keys, null removes one."""
    overlays = _mapping(raw, "overlays", where=path)
    raw.pop("overlays", None)
    if name is None:
        return raw
    if name not in overlays:
        raise ConfigError(
            "no such overlay",
            where=f"{path}: overlays",
            found=f"+{name}",
            expected="one of " + ", ".join(f"+{other}" for other in overlays) if overlays else "no overlay",
            fix=nearest_hint(name, overlays),
        )
    overlay = dict(_mapping(overlays, name, where=f"{path}: overlays"))
    for section in ("space", "overrides"):
        keys = {**_mapping(raw, section, where=path), **_mapping(overlay, section, where=f"{path}: overlays.{name}")}
        overlay.pop(section, None)
        raw[section] = {key: value for key, value in keys.items() if value is not None or section == "overrides"}
    return merge(raw, overlay)


def _mapping(values: Mapping[str, Any], key: str, *, where: str) -> dict[str, Any]:
    """The mapping under a key, empty where there is none.

    Raises:
        ConfigError: it is something else.
    """
    section = values.get(key) or {}
    if not isinstance(section, dict):
        raise ConfigError(
            "not a mapping of keys",
            where=f"{where}: {key}",
            found=repr(section),
            expected="key: value, key: value, ...",
        )
    return section


def _parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words about the sweep, and words about the recipe."""
    own: list[str] = []
    of_recipe: list[str] = []
    for word in words:
        key = word.partition("=")[0]
        first = key.split(".")[0]
        if first in ("space", "overrides"):
            raise ConfigError(
                f"{first} is changed in the file or in an overlay",
                where="command line",
                found=word,
                fix=f"leave `{first}.` out to set a key of the recipe for all trials",
            )
        is_own = first in SweepConfig.model_fields and not (first == "checkpoint" and "." in key)
        (own if is_own else of_recipe).append(word)
    return own, of_recipe


def _with_recipe_keys(overrides: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Overrides with those of the command line behind them."""
    result = dict(overrides)
    for word in words:
        values = parse_overrides([word])
        key = word.partition("=")[0]
        result.pop(key, None)
        result[key] = lookup(values, key)
    return result


def _shared_values(config: SweepConfig) -> dict[str, Any]:
    """What all trials have in common beyond the recipe, nested.

    Many trials fill a disk, so that each keeps two checkpoints, its last and its best, unless the overrides say otherwise.
    """
    values: dict[str, Any] = {}
    if config.recipe is not None:
        best = {"metric": config.metric[0].name, "mode": config.metric[0].mode}
        values = {"checkpoint": {"keep": 1, "keep_best": best}}
    for key, value in config.overrides.items():
        values = merge(values, nested(key, value))
    if config.budget.num_steps is not None:
        values = merge(values, nested("training.num_steps", config.budget.num_steps))
    return values


def _find_recipe(recipe: str, sweep_path: str) -> str:
    """From the working directory, or else from the sweep file's folder."""
    beside = os.path.join(os.path.dirname(sweep_path), recipe)
    return beside if not os.path.isfile(recipe) and os.path.isfile(beside) else recipe


def _sha256(sweep: Sweep) -> str:
    values = sweep.config.model_dump(mode="json", exclude={"name": True, "recipe": True, "budget": {"max_wall_s"}})
    values["recipe_hash"] = None if sweep.recipe is None else sweep.recipe.config_hash
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
