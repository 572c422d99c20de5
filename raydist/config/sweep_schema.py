"""Every key of a sweep file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny, field_validator, model_validator

from raydist.config.base import StrictModel, nearest_hint
from raydist.config.sweep_fairness import SAMPLER_METRICS, MetricConfig, check_metric_name
from raydist.config.sweep_values import Choice, Distribution, parse_distribution
from raydist.core.errors import ConfigError

OWN_BY_TRIAL = ("name", "output_dir", "tracking")
"""First words of recipe keys that cannot be varied."""


class SearchConfig(StrictModel):
    """Which trials there are."""

    name: Literal["grid", "random", "tpe"] = "grid"
    """grid: every combination of lists; random: independent draws; tpe: Optuna's tree-structured Parzen estimator."""
    num_trials: PositiveInt | None = None
    """How many; a grid knows by itself."""
    seed: int = 0
    """Of the draws."""

    @model_validator(mode="after")
    def _number_where_it_is_free(self) -> SearchConfig:
        if self.name == "grid" and self.num_trials is not None:
            raise ValueError("a grid has as many trials as combinations; remove num_trials")
        if self.name != "grid" and self.num_trials is None:
            raise ValueError(f"{self.name} needs num_trials")
        return self


class SchedulerConfig(StrictModel):
    """Which trials are stopped early."""

    name: Literal["none", "asha", "median"] = "none"
    """asha: at each rung the best 1 / reduction_factor go on; median: who is below the median of the others is stopped."""
    grace_steps: PositiveInt | None = None
    """No trial is stopped before this optimizer step; default: the first validation."""
    reduction_factor: int = Field(default=3, ge=2)
    """asha: rungs lie at grace_steps times its powers."""


class BudgetConfig(StrictModel):
    """How much may be spent."""

    max_wall_s: PositiveFloat | None = None
    """After this many seconds no trial is started and running ones are stopped."""
    num_steps: PositiveInt | None = None
    """Optimizer steps of a trial, in place of the recipe's training.num_steps."""


class ContinuationConfig(StrictModel):
    """Of a sweep over samplers: the held-out text that each trial continues."""

    data: str
    """A prepared dataset."""
    num_prompts: PositiveInt = 16
    """Its first rows, one prompt each."""
    prompt_tokens: PositiveInt = 32
    """Tokens of a row that are given."""
    new_tokens: PositiveInt = 32
    """Tokens behind them that are generated and compared with the row's."""


class SweepConfig(StrictModel):
    """One sweep."""

    name: str | None = None
    """Names the sweep's directory and its MLflow run; default: <file>-<hash of the sweep>."""
    recipe: str | None = None
    """The recipe that every trial trains; a path from the working directory, or from the sweep file's folder."""
    checkpoint: str | None = None
    """In place of a recipe: a run or a model directory whose samplers are compared, without training."""
    continuation: ContinuationConfig | None = None
    """With checkpoint: what is generated."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe for all trials."""
    space: dict[str, SerializeAsAny[Distribution]]
    """Key of the recipe -> list of values or distribution."""
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    metric: list[MetricConfig] = Field(min_length=1)
    """What trials are ranked by; several make a Pareto front, ranked by the first."""
    budget: BudgetConfig = BudgetConfig()

    @field_validator("space", mode="before")
    @classmethod
    def _distributions(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value:
            raise ConfigError(
                "the space is empty: there is nothing to vary",
                where="space",
                found=value,
                expected="at least one key of the recipe with its values",
                fix="space: {training.optimizer.learning_rate: [1.0e-3, 3.0e-3]}",
            )
        return {str(key): parse_distribution(item, where=f"space.{key}") for key, item in value.items()}

    @field_validator("metric", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        items = value if isinstance(value, list) else [value]
        return [{"name": item} if isinstance(item, str) else item for item in items]

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[\w][\w.-]*", name):
            raise ValueError("letters, digits, '-', '_' and '.', not starting with '.' or '-'")
        return name

    @model_validator(mode="after")
    def _subject(self) -> SweepConfig:
        if (self.recipe is None) == (self.checkpoint is None):
            raise ValueError("a sweep has either a recipe, which it trains, or a checkpoint, which it samples")
        if (self.checkpoint is None) != (self.continuation is None):
            raise ValueError("checkpoint and continuation belong together: what is sampled, and on which text")
        if self.scheduler.name != "none" and (self.checkpoint is not None or len(self.metric) > 1):
            raise ValueError(f"scheduler {self.scheduler.name} stops training runs by one metric; use none here")
        return self


def check_keys(config: SweepConfig) -> None:
    """Refuses keys that the sweep sets itself, that are set twice, and metrics that are unfair by their name."""
    for section, keys in (("space", config.space), ("overrides", config.overrides)):
        for key in keys:
            own_key = key.split(".")[0]
            if own_key in OWN_BY_TRIAL and (section == "space" or own_key == "name"):
                raise ConfigError(
                    "the sweep sets this key for each trial itself", where=f"{section}.{key}", fix="remove it"
                )
            if config.recipe is not None and (section, own_key) == ("space", "sampling"):
                raise ConfigError(
                    "training does not sample: all trials would be the same",
                    where=f"{section}.{key}",
                    fix="compare samplers on a trained model: checkpoint: RUN in place of recipe",
                )
            if config.checkpoint is not None and own_key not in ("sampling", "output_dir", "tracking"):
                raise ConfigError(
                    "a sweep over samplers trains nothing",
                    where=f"{section}.{key}",
                    found=key,
                    expected="keys of `sampling`, e.g. sampling.sampler.temperature",
                )
            if config.checkpoint is not None and section == "space" and key.split(".")[:2] != ["sampling", "sampler"]:
                raise ConfigError(
                    "the continuation says what is generated; only the sampler can be varied",
                    where=f"space.{key}",
                    found=key,
                    expected="sampling.sampler or a key below it, e.g. sampling.sampler.temperature",
                )
    _refuse_twice(config)
    for metric in config.metric:
        if config.checkpoint is None:
            check_metric_name(metric)
        elif metric.name not in SAMPLER_METRICS:
            raise ConfigError(
                "a sweep over samplers does not measure this",
                where="metric.name",
                found=metric.name,
                expected="one of " + ", ".join(SAMPLER_METRICS),
                fix=nearest_hint(metric.name, SAMPLER_METRICS),
            )


def _refuse_twice(config: SweepConfig) -> None:
    """Refuses a key that is set for all trials and replaced by what the space, or the budget, says."""
    shared = dict(config.overrides)
    if config.budget.num_steps is not None:
        if "training.num_steps" in shared:
            raise ConfigError(
                "a key is set twice",
                where="overrides.training.num_steps",
                found="training.num_steps is set for all trials, and by the budget as well",
                fix="remove one of them",
            )
        shared["training.num_steps"] = config.budget.num_steps
    for key, value in shared.items():
        for setter, distribution in config.space.items():
            if not _replaces(setter, distribution, key, value):
                continue
            raise ConfigError(
                "a key is set twice",
                where=f"space.{setter}",
                found=f"{key} is varied, and set for all trials or by the budget as well",
                fix=f"remove {key} from one of them",
            )


def _replaces(own: str, distribution: Distribution, key: str, value: Any) -> bool:
    """Whether a key of the space replaces what ``key`` sets for all trials: the same key, or a value with part of it."""
    if own == key:
        return True
    if not key.startswith(own + ".") or not isinstance(distribution, Choice):
        return False
    paths = list(_leaves(value, key.removeprefix(own + ".").split(".")))
    return any(_has(choice, path) for choice in distribution.choice for path in paths)


def _leaves(value: Any, path: list[str]) -> Iterator[list[str]]:
    """The paths of all that is set by a value under ``path``."""
    if not isinstance(value, Mapping):
        yield path
        return
    for key, item in value.items():
        yield from _leaves(item, [*path, key])


def _has(value: Any, path: Sequence[str]) -> bool:
    """Whether a value says something about a path below it; anything but a mapping says all."""
    if not path or not isinstance(value, Mapping):
        return True
    return path[0] in value and _has(value[path[0]], path[1:])
