"""Whether the trials of a sweep may be ranked: by a metric that is the same quantity in all of them, on the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

from raydist.config.base import StrictModel, nearest_hint
from raydist.config.load import flatten
from raydist.config.schema import RunConfig
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds

FAIR_METRICS = ("validation/bound_nats_per_token", "validation/loss/ntp")
"""Likelihoods in nats per token: they do not depend on how the objective weighs or corrupts."""

SAMPLER_METRICS = ("accuracy", "tokens_per_forward", "forwards_per_token")
"""Of a sweep over samplers: the share of tokens that are those of the held-out text, and what a token costs."""

_BETTER: dict[str, Literal["min", "max"]] = {
    **dict.fromkeys(FAIR_METRICS, "min"),
    "accuracy": "max",
    "tokens_per_forward": "max",
    "forwards_per_token": "min",
}

_PREFIX = "validation/"

# With other values under one of these keys a metric is a mean over other tokens or with other context.
_MEASURES_OF_DATA = ("data.validation", "data.seq_len", "training.validation_objective")
_MEASURES = (
    *_MEASURES_OF_DATA,
    "objective.path.coupling",
    "objective.condition_dropout",
    "objective.random_length",
    "objective.shift",
)

_PROBE_IDS = TokenIds(vocab_size=260, bos=256, eos=257, mask=258, pad=259)
_PROBE_ROWS, _PROBE_TOKENS = 2, 17


class MetricConfig(StrictModel):
    """What trials are ranked by."""

    name: str
    """As it is logged, e.g. validation/bound_nats_per_token."""
    mode: Literal["min", "max"] = "min"
    """What is better: small or large values; default: max for accuracy and tokens_per_forward, min for all others."""

    @model_validator(mode="before")
    @classmethod
    def _mode_by_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and "mode" not in value and isinstance(value.get("name"), str):
            return {**value, "mode": _BETTER.get(value["name"], "min")}
        return value

    @model_validator(mode="after")
    def _mode_is_meant(self) -> MetricConfig:
        better = _BETTER.get(self.name, self.mode)
        if self.mode != better:
            raise ValueError(f"mode {self.mode} would rank the worst trial first: {self.name} wants {better}")
        return self


def reported_metrics(objective: Any, *, ids: TokenIds = _PROBE_IDS) -> frozenset[str]:
    """What an objective reports: it is asked with two rows and with costs of zero.

    Args:
        objective: the configuration.
        ids: of a vocabulary that the objective can be built for.

    Raises:
        ConfigError: it cannot be built for this vocabulary.
    """
    import torch

    from raydist.core.rng import RowRng
    from raydist.core.rows import Rows
    from raydist.core.terms import TermResult

    built = objective.build(ids).for_validation()
    rows_B, zeros_B = torch.arange(_PROBE_ROWS), torch.zeros(_PROBE_ROWS, dtype=torch.int64)
    shape = (_PROBE_ROWS, _PROBE_TOKENS)
    rows = Rows(
        step=0,
        tokens_BS=torch.arange(_PROBE_ROWS * _PROBE_TOKENS).reshape(shape) % 8,
        documents_BS=torch.zeros(shape, dtype=torch.int32),
        loss_mask_BS=None,
        rows_B=rows_B,
        epochs_B=zeros_B,
        samples_B=rows_B,
    )
    noised = built.corrupt(rows, RowRng(seed=0, step=0, epochs_B=zeros_B, rows_B=rows_B, samples_B=rows_B))
    nothing = torch.zeros(())
    results = [TermResult(term, nothing, torch.zeros(len(term.positions_T))) for term in built.terms(noised)]
    return frozenset({"loss", *built.combine(results).metrics})


def check_metric_name(metric: MetricConfig) -> None:
    """Refuses what is unfair by its name.

    Raises:
        ConfigError: a training loss, a sum that the objective weighs itself, or no validation metric.
    """
    bare = metric.name.removeprefix(_PREFIX)
    if bare == "loss" or (bare == metric.name and bare.startswith("loss/")):
        where_read = "of training steps" if bare == metric.name else "of validation"
        raise ConfigError(
            f"unfair metric: `{metric.name}` is the loss {where_read}, which each trial's objective weighs in its own way",
            where="metric.name",
            found=metric.name,
            expected="a quantity that is the same for all schedules, paths and weights: " + " or ".join(FAIR_METRICS),
            fix=f"metric: {{name: {FAIR_METRICS[0]}, mode: min}}",
        )
    if bare == metric.name:
        raise ConfigError(
            "no objective reports this metric in validation",
            where="metric.name",
            found=metric.name,
            expected=" or ".join(FAIR_METRICS) + f", or another {_PREFIX}... metric of the objective",
            fix=nearest_hint(metric.name, FAIR_METRICS) or nearest_hint(_PREFIX + metric.name, FAIR_METRICS),
        )


def check_metric(
    metric: MetricConfig,
    trials: Sequence[Mapping[str, Any]],
    configs: Sequence[RunConfig],
    *,
    ids: TokenIds | None = None,
) -> None:
    """Refuses a metric that some trial does not report, or that is no mean over the same things in all trials.

    Args:
        metric: of the sweep.
        trials: what each trial sets.
        configs: its resolved recipe, in the same order.
        ids: of the dataset; without it, objectives that cannot be built for bytes are taken at their word.

    Raises:
        ConfigError: see above.
    """
    check_metric_name(metric)
    bare = metric.name.removeprefix(_PREFIX)
    known: dict[str, frozenset[str]] = {}
    for trial, config in zip(trials, configs, strict=True):
        objective: Any = config.training.validation_objective or config.objective
        word = objective.model_dump_json()
        if word not in known:
            try:
                known[word] = reported_metrics(objective, ids=ids or _PROBE_IDS)
            except ConfigError:
                if ids is not None:
                    raise
                known[word] = frozenset({bare})
        if bare not in known[word]:
            _refuse_unreported(metric, trial, objective.name, sorted(known[word] - {"loss"}))
    sizes = sorted({config.training.batch_rows for config in configs})
    if metric.name != FAIR_METRICS[1] and len(sizes) > 1:
        key = related_key("training.batch_rows", [key for trial in trials for key in trial])
        raise ConfigError(
            "unfair trials: times and block sizes are drawn once a batch, so that other batches measure other draws",
            where=f"space.{key}",
            found=f"{metric.name} with batches of {' and '.join(map(str, sizes))} rows",
            expected=f"one training.batch_rows, or {FAIR_METRICS[1]}, which needs no draws",
            fix="take training.batch_rows out of the space, and set it under overrides",
        )
    if metric.name not in FAIR_METRICS and len(known) > 1:
        raise ConfigError(
            f"unfair metric: `{metric.name}` is a mean over what the objective makes of the text, and the objective is varied",
            where="metric.name",
            found=f"{metric.name} with {len(known)} different objectives",
            expected=" or ".join(FAIR_METRICS),
            fix="choose one of these, or validate all trials by one objective:\n"
            "overrides: {training.validation_objective: {...}}",
        )


def _refuse_unreported(metric: MetricConfig, trial: Mapping[str, Any], objective: str, reported: list[str]) -> None:
    names = [_PREFIX + name for name in reported]
    bound = metric.name == FAIR_METRICS[0]
    raise ConfigError(
        "this metric is not reported by every trial",
        where="metric.name",
        found=f"{metric.name}, for objective {objective} with {label(trial) or 'no change'}",
        expected="one of " + ", ".join(names),
        fix="discrete_flow reports the bound with every loss and path, as long as its times are drawn from the whole range\n"
        "(objective.time: {low: 0.0, high: 0.999}); paths that are no mixtures need a small vocabulary, such as bytes"
        if bound
        else nearest_hint(metric.name, names),
    )


def check_comparable(configs: Sequence[RunConfig], *, keys: Sequence[str]) -> None:
    """Refuses trials that would be measured on other rows or tokens than others, or never.

    Args:
        configs: resolved recipes of the trials.
        keys: of the space, for the message.

    Raises:
        ConfigError: naming the key that differs.
    """
    for config in configs:
        if not config.data.validation or config.training.validate_every_steps is None:
            missing = "data.validation" if not config.data.validation else "training.validate_every_steps"
            raise ConfigError(
                "trials are ranked by validation, and this recipe has none",
                where=f"overrides.{missing}",
                found="nothing",
                fix=f"set it under overrides: {missing}: ...",
            )
    flat = [flatten(config.model_dump(mode="json")) for config in configs]
    own_objective = any(config.training.validation_objective is None for config in configs)
    for measure in _MEASURES if own_objective else _MEASURES_OF_DATA:
        parts = [{key: value for key, value in one.items() if (key + ".").startswith(measure + ".")} for one in flat]
        present = {json.dumps(part, sort_keys=True): part for part in parts if part}
        if len(present) > 1:
            _refuse_incomparable(measure, list(present), keys)
    rows = sorted({config.training.batch_rows * config.training.validation_batches for config in configs})
    if len(rows) > 1:
        raise ConfigError(
            "unfair trials: they are validated on different numbers of rows",
            where=_related("training.batch_rows", keys) or _related("training.validation_batches", keys),
            found="training.batch_rows x training.validation_batches = " + ", ".join(map(str, rows)),
            expected="the same product in all trials",
            fix="vary both together, as in\n"
            "training: [{batch_rows: 8, validation_batches: 4}, {batch_rows: 16, validation_batches: 2}]",
        )


def _refuse_incomparable(measure: str, found: Sequence[str], keys: Sequence[str]) -> None:
    raise ConfigError(
        f"unfair trials: with another {measure} the metric is a mean over other tokens, or with other context",
        where=_related(measure, keys),
        found=" and ".join(found[:3]),
        expected="the same in all trials",
        fix=f"take {measure} out of the space and set it under overrides",
    )


def _related(key: str, keys: Sequence[str]) -> str | None:
    own = related_key(key, keys)
    return None if own is None else f"space.{own}"


def related_key(key: str, keys: Sequence[str]) -> str | None:
    """The longest of ``keys`` that sets ``key``, or a part of it."""
    hits = [own for own in keys if (key + ".").startswith(own + ".") or own.startswith(key + ".")]
    return max(hits, key=len, default=None)


def label(value: Any) -> str:
    """A value in few words: ``mixture(source=uniform)`` for a choice with its fields, ``a=1 b=2`` for other mappings."""
    if isinstance(value, Mapping):
        fields = [f"{key}={label(item)}" for key, item in value.items() if key != "name"]
        if "name" not in value:
            return " ".join(fields)
        return f"{value['name']}({', '.join(fields)})" if fields else str(value["name"])
    if isinstance(value, list | tuple):
        return "[" + ", ".join(label(item) for item in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
