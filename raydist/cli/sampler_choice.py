"""From the flags of ``raydist sample`` to a sampler's configuration."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydist.sampling.base import SamplerConfig


def explicit_sampler(args: argparse.Namespace) -> SamplerConfig | None:
    """The sampler that ``--sampler`` names, or None.

    Raises:
        ConfigError: unknown sampler or setting.
    """
    from raydist.config.load import parse_overrides
    from raydist.config.registries import SAMPLERS

    if not args.sampler:
        return None
    name, *overrides = args.sampler
    config: SamplerConfig = SAMPLERS.parse(_with_flags({"name": name, **parse_overrides(overrides)}, args))
    return config


def default_sampler(args: argparse.Namespace, defaults: Mapping[str, Any]) -> SamplerConfig:
    """The recipe's sampler; flags that only samplers of masks know choose set_block.

    Args:
        args: of the command line.
        defaults: the recipe's ``sampling`` section; empty for a model that raydist did not train.

    Raises:
        ConfigError: a flag does not fit the sampler.
    """
    from raydist.config.registries import SAMPLERS

    recipe = defaults.get("sampler") or {"name": "autoregressive"}
    if recipe["name"] == "autoregressive" and _settings(args, "gamma", "block_size"):
        recipe = {"name": "set_block"}
    config: SamplerConfig = SAMPLERS.parse(_with_flags(recipe, args))
    return config


def compared_samplers(args: argparse.Namespace, config: SamplerConfig) -> list[SamplerConfig]:
    """What stands side by side; with ``--gamma`` that bound alone, beside what has none."""
    compared = config.compared()
    if args.gamma is None:
        return compared
    return [*(other for other in compared if other.name != config.name), config]


def _settings(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the flags that were given."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _with_flags(sampler: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A sampler's settings with the flags that were given; ``--gamma`` chooses the entropy-bounded policy.

    Raises:
        ConfigError: ``--gamma`` for a sampler that has no unmasking policy.
    """
    from raydist.config.registries import SAMPLERS
    from raydist.core.errors import ConfigError

    flags = _settings(args, "block_size", "temperature")
    if args.gamma is None:
        return {**sampler, **flags}
    classes = SAMPLERS.classes()
    name = sampler["name"]
    if name in classes and "unmasking" not in classes[name].model_fields:
        having = [other for other, cls in classes.items() if "unmasking" in cls.model_fields]
        raise ConfigError(
            "this sampler has no entropy bound", where="--gamma", found=name, expected=f"one of {', '.join(having)}"
        )
    policy = sampler.get("unmasking") or {}
    policy = policy if isinstance(policy, dict) and policy.get("name", "entropy_bounded") == "entropy_bounded" else {}
    return {**sampler, **flags, "unmasking": {**policy, "name": "entropy_bounded", "gamma": args.gamma}}
