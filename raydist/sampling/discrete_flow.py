"""Discrete Flow Matching: a Markov chain from the source to text, every position moving at its own moments.

Source: Gat et al. 2024, "Discrete Flow Matching", arXiv 2407.15595, Algorithm 1; Shaul et al. 2025, "Flow Matching with
General Discrete Paths", arXiv 2412.03487.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from raydist.config.base import StrictModel, choice
from raydist.config.registries import PATHS, SAMPLERS
from raydist.core.errors import ConfigError
from raydist.paths.base import Path, PathConfig
from raydist.paths.mixture import MixturePath
from raydist.sampling.base import Generation, Sampler, SamplerConfig, Trained
from raydist.sampling.canvas import Canvas
from raydist.sampling.drawing import PromptNoise
from raydist.sampling.flow_clock import FlowClock, GridName, flow_clock
from raydist.sampling.flow_rollout import FlowRollout
from raydist.sampling.prefill import check_prompts

_GAP_MARK = -1


class DiscreteFlow(Sampler):
    """Simulates the chain on a canvas of fixed length; a stop id cuts the text afterwards.

    One step from t to t + h, each position on its own (always valid, whatever h)::

        x1 ~ p_{1|t}(. | x_t)
        r = u_t(., x | x1) + c_t (u_t - backward u_t)(., x | x1)
        leave with probability 1 - exp(-h sum_{v != x} r(v)), for v ~ r

    With the mask source a masked position leaves with its exact probability, so that time steps cost no accuracy: what
    remains is that positions that leave together are drawn independently. The last step sets every position to its x1.

    **Nothing is computed that the noise makes irrelevant.** Whether a position could leave is known from its own
    uniform before the model is asked (:meth:`raydist.paths.base.Path.may_jump`), so the head is applied, and a clean
    token drawn, only there; a row without such a position needs no forward at all. The law is exactly that of the step
    above. For the mask source a token that is no mask is data (its posterior is known), so without corrector a row of
    n tokens takes at most n forwards.

    **Corrector.** ``c_t = A t^a (1 - t)^b`` adds ``c_t`` times forward and backward velocity, alpha = 1 + c_t and beta =
    c_t of Gat et al.: same marginals, tokens may change again. It is 0 in the first step, where the backward velocity is
    infinite. With ``iterations`` there are updates at frozen t (alpha = beta) as well: a share of the positions draws x1
    and then ``x_t ~ p_t(. | x1)``, which leaves p_t invariant.

    ``num_forwards`` counts every forward of the model, both of a guided step. A prompt's result does not depend on the
    other prompts of the batch.
    """

    def __init__(
        self,
        config: DiscreteFlowSamplerConfig,
        *,
        path: Path,
        clock: FlowClock,
        shift: bool,
        trained: Trained,
    ) -> None:
        self.config = config
        self.path = path
        self.clock = clock
        self.times = clock.grid(config.time_grid, power=config.grid_power, num_steps=config.num_steps)
        self.shift = shift
        self.trained = trained

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Continues each prompt by a canvas of ``max_new_tokens``."""
        check_prompts(prompts, max_new_tokens=max_new_tokens, max_positions=model.config.max_positions)
        nothing: list[Sequence[int]] = [()] * len(prompts)
        return self._roll_out(model, prompts, nothing, num_new_tokens=max_new_tokens, stop_ids=self.trained.stop_ids)

    def infill(
        self, model: Any, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]], *, num_new_tokens: int
    ) -> list[Generation]:
        """Fills each gap with exactly ``num_new_tokens`` tokens; stop ids do not cut.

        Raises:
            ConfigError: too long for the model, or no prefix for a model that reads a position from the one before it.
        """
        if self.shift and not all(len(prefix) for prefix in prefixes):
            raise ConfigError(
                "a gap at the start of the text cannot be filled by a shifted model",
                where="prefix",
                found="no tokens",
                expected="at least one: the first token of the gap is read from the position before it",
            )
        return self._roll_out(model, prefixes, suffixes, num_new_tokens=num_new_tokens, stop_ids=())

    @torch.inference_mode()
    def _roll_out(
        self,
        model: Any,
        prefixes: Sequence[Sequence[int]],
        suffixes: Sequence[Sequence[int]],
        *,
        num_new_tokens: int,
        stop_ids: Sequence[int],
    ) -> list[Generation]:
        if not prefixes:
            return []
        rollout = self.rollout(model, prefixes, suffixes, num_new_tokens=num_new_tokens)
        self.run(rollout)
        return rollout.history.generations(rollout.tokens_BL, canvas=rollout.canvas, stop_ids=stop_ids)

    def rollout(
        self, model: Any, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]], *, num_new_tokens: int
    ) -> FlowRollout:
        """The chain at t = 0; arguments as for :meth:`infill`."""
        device = next(model.parameters()).device
        canvas = Canvas.of(
            prefixes,
            suffixes,
            num_new_tokens=num_new_tokens,
            max_positions=model.config.max_positions,
            device=device,
        )
        keys = [
            [*prefix, _GAP_MARK, *suffix] if suffix else list(prefix)
            for prefix, suffix in zip(prefixes, suffixes, strict=True)
        ]
        return FlowRollout(
            model,
            path=self.path,
            clock=self.clock,
            canvas=canvas,
            noise=PromptNoise(keys, seed=self.trained.seed, device=device),
            ids=self.trained.ids,
            guidance=self.config.guidance,
            shift=self.shift,
            keep_states=self.path.absorbing_id is None or self.config.corrector.revises,
        )

    def run(self, rollout: FlowRollout) -> None:
        """All steps of a chain, each followed by its corrector updates."""
        config, corrector = self.config, self.config.corrector
        for step, (start, stop) in enumerate(pairwise(self.times)):
            rollout.jump(
                start,
                stop,
                corrector=corrector.at(start),
                noise_prediction=corrector.form == "noise_prediction",
                temperature=config.temperature_at(start),
                purpose=f"flow/{step}",
            )
            for iteration in range(corrector.iterations if stop < 1.0 else 0):
                rollout.refresh(
                    stop,
                    share=corrector.share,
                    temperature=config.temperature_at(stop),
                    purpose=f"flow/{step}/{iteration}",
                )


class CorrectorConfig(StrictModel):
    """Re-noising that keeps the marginals: ``c_t = strength t^power_start (1 - t)^power_stop``, and updates at frozen t."""

    strength: float = Field(default=0.0, ge=0)
    """A; 0 for none. Gat et al. tried 10, 15 and 20 for text."""
    power_start: float = Field(default=0.25, ge=0)
    """a."""
    power_stop: float = Field(default=0.25, ge=0)
    """b."""
    form: Literal["source", "noise_prediction"] = "source"
    """The backward velocity: source re-noises any token; noise_prediction, from p_{0|t}, only those that are data by now."""
    iterations: int = Field(default=0, ge=0)
    """Updates at frozen time after each step, a forward each."""
    share: float = Field(default=0.1, gt=0, le=1)
    """Probability that a position is drawn anew in such an update (our choice)."""

    @property
    def revises(self) -> bool:
        """Whether a token may change after it became data."""
        return self.strength > 0.0 or self.iterations > 0

    def at(self, time: float) -> float:
        """``c_t``; 0 at t = 0, where the backward velocity is infinite."""
        return self.strength * time**self.power_start * (1.0 - time) ** self.power_stop if time > 0.0 else 0.0


@SAMPLERS.register
class DiscreteFlowSamplerConfig(SamplerConfig):
    """All positions at once, from the source to text in a chosen number of steps (Discrete Flow Matching)."""

    name: Literal["discrete_flow"] = "discrete_flow"
    path: choice(PATHS, PathConfig) | None = None  # type: ignore[valid-type]
    """null: the path that the model was trained with. A mixture with another schedule may be given after training."""
    num_steps: PositiveInt = 64
    """Steps of the chain; at most that many forwards (twice as many with guidance), and fewer with the mask source."""
    time_grid: GridName = "uniform"
    """uniform: t = i / n; power: t = (i / n)^grid_power; kappa: equal shares of the data a step, for mixture paths."""
    grid_power: PositiveFloat = 2.0
    """Of the power grid; above 1 the steps are short near the noise, below 1 near the data."""
    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits of p_{1|t}; 0 takes the most likely token, and only 1 keeps the law of the model."""
    temperature_schedule: Literal["constant", "squared"] = "constant"
    """squared: temperature times (1 - t)^2, as the large models of Gat et al."""
    corrector: CorrectorConfig = CorrectorConfig()
    guidance: float = Field(default=0.0, gt=-1)
    """Weight w of guidance by the condition: twice the forwards. 0 is off."""

    def temperature_at(self, time: float) -> float:
        """The temperature of a step."""
        return self.temperature * (1.0 - time) ** 2 if self.temperature_schedule == "squared" else self.temperature

    @property
    def setting(self) -> str:
        """The number of steps."""
        return f"num_steps {self.num_steps}"

    def compared(self) -> list[SamplerConfig]:
        """With a quarter of the steps, as set, and with four times as many."""
        return self.at("num_steps", max(1, self.num_steps // 4), self.num_steps, 4 * self.num_steps)

    def build(self, trained: Trained) -> DiscreteFlow:
        """The sampler.

        Raises:
            ConfigError: no path is known, the path does not fit the training's or the time grid, or the vocabulary lacks the
                path's mask id.
        """
        objective = trained.objective or {}
        trained_path = PATHS.parse(objective["path"]) if objective.get("name") == "discrete_flow" else None
        chosen = self.path if self.path is not None else trained_path
        if chosen is None:
            raise ConfigError(
                "the path is not known: the model was not trained with discrete_flow",
                where="sampler.path",
                found=f"objective {objective.get('name')}",
                expected="the path that fits the model",
                fix="name it, e.g. --sampler discrete_flow path.name=mixture path.source.name=mask",
            )
        path: Path = chosen.build(trained.ids)
        if self.corrector.form == "noise_prediction" and not isinstance(path, MixturePath):
            raise ConfigError(
                "this path has no noise prediction",
                where="sampler.corrector.form",
                found=f"path {chosen.name}",
                expected="a mixture path",
                fix="use corrector.form=source",
            )
        return DiscreteFlow(
            self,
            path=path,
            clock=flow_clock(chosen, trained_path=trained_path),
            shift=bool(objective.get("shift", False)),
            trained=trained,
        )
