"""The same prompts through several samplers: what a token costs in forwards and in seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydist.sampling.base import Generation, SamplerConfig, Trained

_WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class SamplerResult:
    """One row of the table, over all prompts.

    Attributes:
        config: the sampler's settings.
        generations: what each prompt became.
        seconds: wall-clock time of the one call that continued all prompts as one batch.
    """

    config: SamplerConfig
    generations: list[Generation]
    seconds: float

    @property
    def gamma(self) -> float | None:
        """The entropy bound in nats; None for a sampler without one."""
        return getattr(getattr(self.config, "unmasking", None), "gamma", None)

    @property
    def num_tokens(self) -> int:
        """Generated tokens of all prompts."""
        return sum(len(generation.tokens) for generation in self.generations)

    @property
    def num_forwards(self) -> int:
        """Forwards that the prompts needed, each counted as if it were alone."""
        return sum(generation.num_forwards for generation in self.generations)

    @property
    def tokens_per_forward(self) -> float:
        """The speed-up that the papers report, if a forward over a block costs what one over a token does."""
        return self.num_tokens / max(1, self.num_forwards)


def compare_samplers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    configs: Sequence[SamplerConfig],
    trained: Trained,
    max_new_tokens: int,
) -> list[SamplerResult]:
    """Runs every sampler on the same prompts with the same noise; a short untimed call warms each up.

    Raises:
        ConfigError: a sampler cannot be built for this vocabulary, or a prompt cannot be continued.
    """
    samplers = [config.build(trained) for config in configs]
    results = []
    for config, sampler in zip(configs, samplers, strict=True):
        sampler.generate(model, prompts, max_new_tokens=min(max_new_tokens, _WARM_UP_TOKENS))
        start_s = time.perf_counter()
        generations = sampler.generate(model, prompts, max_new_tokens=max_new_tokens)
        results.append(SamplerResult(config, generations, time.perf_counter() - start_s))
    return results


def sampler_label(config: SamplerConfig) -> str:
    """``set_block, block_size 16, gamma 0.35``: the sampler and those settings that say how it decodes."""
    special = ("name", "block_size", "unmasking")
    others = [
        name
        for name, field in type(config).model_fields.items()
        if name not in special and getattr(config, name) != field.get_default(call_default_factory=True)
    ]
    policy = getattr(config, "unmasking", None)
    words = [
        _setting(config, "block_size"),
        None if policy is None else policy.label,
        *(_setting(config, name) for name in others),
    ]
    return ", ".join([config.name, *filter(None, words)])


def _setting(config: SamplerConfig, name: str) -> str | None:
    """``block_size 16``; None where there is no such key or it is left open."""
    value = getattr(config, name, None)
    return None if value is None else f"{name} {value}"
