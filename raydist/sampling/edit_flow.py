"""Edit Flows: texts that start from nothing, from noise or from a draft, and change by simultaneous edits.

Source: Havasi et al. 2025, "Edit Flows: Flow Matching with Edit Operations", arXiv 2506.09018.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.sampling.base import Generation, Sampler, SamplerConfig, Trained
from raydist.sampling.drawing import PromptNoise
from raydist.sampling.edit_process import TrainedProcess, trained_process
from raydist.sampling.edit_rates import (
    CHANGE,
    DRAWS_PER_TOKEN,
    EditHeads,
    Guidance,
    GuidanceRule,
    TokenChoice,
    propose_edits,
)
from raydist.sampling.edit_state import EditProposal, EditState, apply_edits, require_room

_GAP_MARK = -1


class EditFlow(Sampler):
    """Tau-leaping of the edit process on an even time grid.

    A step from t to t' evaluates the model once at t. With ``J = (kappa_t' - kappa_t) / (1 - kappa_t)``, the probability that a
    column that is not there at t is there at t', and x the rate relative to the schedule's, which for trained rates is the
    expected number of edits that are still missing at that place, an edit happens with probability ``J x`` where x <= 1 and
    ``1 - (1 - J)^x`` above. The second is ``1 - exp(-integral of the rate)``; the first is exact where at most one edit is
    missing, agrees with it to first order, and keeps the last step, where the integral diverges and J = 1, an honest guess:
    an edit that is missing with probability x is made with probability x. (Our choice; the paper takes h times the rate.)
    Insertions and changes of all places are drawn independently, deletion or substitution by their shares, and applied at
    once.

    With a correction ``a_t`` the step goes on to ``t + h (1 + a_t)`` and back to ``t + h`` with the reverse rates, which leaves
    the law of the process as it is and repairs earlier steps. For a model that starts from nothing the reverse rates are
    known and cost no forward: each free token disappears with probability ``1 - kappa(t + h) / kappa(t + h (1 + a_t))``.

    Given tokens are never edited, and the begin token never goes. The free part of a text has at most ``max_new_tokens``
    tokens at any time; a full text takes insertions from the left (:func:`raydist.sampling.edit_state.apply_edits`).

    ``num_forwards`` counts every model evaluation, two where guidance needs both. ``revealed_at`` is 0 for tokens of a start
    that nothing replaced. ``states`` holds the free part after each step. A stop id ends a text; in a gap it is a token like
    others. Tokens that are never drawn (mask, begin, padding) and are left over from a noisy start do not appear in the result.
    """

    def __init__(self, config: EditFlowSamplerConfig, *, process: TrainedProcess, trained: Trained) -> None:
        self.config = config
        self.process = process
        self.stop_ids = tuple(trained.stop_ids)
        self.seed = trained.seed
        self.vocab_size = trained.ids.vocab_size
        never = {trained.ids.mask, trained.ids.bos, trained.ids.pad} - {trained.ids.eos, *self.stop_ids}
        self.never_drawn = tuple(sorted(token for token in never if token is not None))

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Continues each prompt from the start that the model was trained with: nothing, or noise."""
        return self._run(model, prompts, [()] * len(prompts), limit=max_new_tokens, stop_ids=self.stop_ids)

    def infill(
        self, model: Any, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]], *, num_new_tokens: int
    ) -> list[Generation]:
        """Fills the gap between each prefix and its suffix with at most ``num_new_tokens`` tokens.

        Raises:
            ConfigError: a suffix, and a model that was trained with beginnings alone.
        """
        if any(suffixes) and not self.process.fills_gaps:
            raise ConfigError(
                "the model never saw text behind a gap",
                where="objective.condition",
                found="prefix",
                expected="ends",
                fix="train with objective.condition=ends",
            )
        return self._run(model, prefixes, suffixes, limit=num_new_tokens, stop_ids=())

    def revise(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        start_time: float,
    ) -> list[Generation]:
        """Edits drafts behind their prompts, from a time on.

        Args:
            model: a decoder in evaluation mode.
            prompts: given tokens.
            drafts: free tokens at the start.
            max_new_tokens: an upper limit of the free part.
            start_time: how finished the drafts are held to be, in [0, 1).
        """
        if not 0 <= start_time < 1:
            raise ConfigError("no time to revise in", where="start_time", found=start_time, expected="in [0, 1)")
        longest = max(map(len, drafts), default=0)
        if longest > max_new_tokens:
            raise ConfigError(
                "a draft is longer than its limit",
                where="max_new_tokens",
                found=f"{max_new_tokens} for a draft of {longest} tokens",
                expected=f"at least {longest}",
            )
        return self._run(
            model,
            prompts,
            [()] * len(prompts),
            limit=max_new_tokens,
            stop_ids=self.stop_ids,
            drafts=drafts,
            start_time=start_time,
        )

    @torch.inference_mode()
    def _run(
        self,
        model: Any,
        prefixes: Sequence[Sequence[int]],
        suffixes: Sequence[Sequence[int]],
        *,
        limit: int,
        stop_ids: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
        start_time: float = 0.0,
    ) -> list[Generation]:
        if not prefixes:
            return []
        device = next(model.parameters()).device
        parts = zip(prefixes, [()] * len(prefixes) if drafts is None else drafts, suffixes, strict=True)
        keys = [[*prefix, _GAP_MARK, *draft, _GAP_MARK, *suffix] for prefix, draft, suffix in parts]
        noise = PromptNoise(keys, seed=self.seed, device=device)
        begin = self.process.begin_id
        first = [list(prefix) if prefix and prefix[0] == begin else [begin, *prefix] for prefix in prefixes]
        if drafts is None:
            given = [[*prefix, *suffix] for prefix, suffix in zip(first, suffixes, strict=True)]
            drafts = self.process.draw_start(given, limit=limit, noise=noise)
        state = EditState.of(first, drafts, suffixes, limit=limit, fill=begin, device=device)
        require_room(state, max_positions=model.config.max_positions)
        rollout = _Rollout(self, model, state, noise=noise)
        num_steps = self.config.num_steps
        states = []
        times = [start_time + (1 - start_time) * (step / num_steps) for step in range(num_steps + 1)]
        for time, stop in pairwise(times):
            reach = min(1.0, stop + (stop - time) * self.config.correction(time)) if stop < 1 else 1.0
            rollout.forward(time, reach)
            if reach > stop:
                rollout.backward(reach, stop)
            states.append(rollout.state)
        return self._generations(states, num_forwards=rollout.num_forwards, stop_ids=stop_ids)

    def _generations(
        self, states: Sequence[EditState], *, num_forwards: int, stop_ids: Sequence[int]
    ) -> list[Generation]:
        texts = [state.free_lists(state.tokens_BL) for state in states]
        born = states[-1].free_lists(states[-1].born_BL)
        generations = []
        for row, text in enumerate(texts[-1]):
            kept = [(token, at) for token, at in zip(text, born[row], strict=True) if token not in self.never_drawn]
            stops = [index for index, (token, _) in enumerate(kept) if token in stop_ids]
            kept = kept[: stops[0] + 1] if stops else kept
            generations.append(
                Generation(
                    tokens=[token for token, _ in kept],
                    num_forwards=num_forwards,
                    revealed_at=[at for _, at in kept],
                    stopped=bool(stops),
                    states=[state_texts[row] for state_texts in texts],
                )
            )
        return generations


class _Rollout:
    """The edit process on one batch: the texts, and the forwards spent on them."""

    def __init__(self, sampler: EditFlow, model: Any, state: EditState, *, noise: PromptNoise) -> None:
        self.sampler, self.config, self.process = sampler, sampler.config, sampler.process
        self.model, self.state, self.noise = model, state, noise
        self.num_forwards = 0

    def forward(self, start: float, stop: float) -> None:
        """From ``start`` on to ``stop`` with the forward rates."""
        times = torch.tensor([start, stop], dtype=torch.float64)
        self._leap(
            time=start,
            jump=float(self.process.schedule.jump_probability(times[0], times[1])),
            heads=self.process.forward,
            guidance=self.config.forward_guidance,
            temperature=self.config.temperature_at(start),
            uniforms_BL4=self._uniforms("edit"),
        )

    def backward(self, start: float, stop: float) -> None:
        """From ``start`` back to ``stop`` with the reverse rates."""
        kappa = self.process.schedule.value(torch.tensor([start, stop], dtype=torch.float64))
        jump = float(1 - kappa[1] / kappa[0])
        uniforms_BL4, state = self._uniforms("edit/back"), self.state
        if self.process.reverse is None:
            nowhere_BL = torch.zeros_like(state.free_BL)
            delete_BL = state.free_BL & (uniforms_BL4[..., CHANGE] < jump)
            self._apply(EditProposal(nowhere_BL, state.tokens_BL, delete_BL, nowhere_BL, state.tokens_BL))
            return
        temperature = self.config.reverse_temperature
        self._leap(
            time=start,
            jump=jump,
            heads=self.process.reverse,
            guidance=self.config.backward_guidance,
            temperature=self.config.temperature_at(start) if temperature is None else temperature,
            uniforms_BL4=uniforms_BL4,
        )

    def _leap(
        self,
        *,
        time: float,
        jump: float,
        heads: EditHeads,
        guidance: Guidance,
        temperature: float,
        uniforms_BL4: Tensor,
    ) -> None:
        """Edits by the rates at one time."""
        sampler = self.sampler
        proposal = propose_edits(
            self.model,
            self.state,
            time=time,
            jump=jump,
            heads=heads,
            guidance=guidance,
            choice=TokenChoice(
                temperature, self.config.top_k, self.config.top_p, sampler.vocab_size, sampler.never_drawn
            ),
            uniforms_BL4=uniforms_BL4,
        )
        self.num_forwards += guidance.num_forwards
        self._apply(proposal)

    def _apply(self, proposal: EditProposal) -> None:
        self.state = apply_edits(self.state, proposal, forward=self.num_forwards)

    def _uniforms(self, purpose: str) -> Tensor:
        """Uniforms per place, the same ones however long the longest text of the batch is."""
        length = self.state.tokens_BL.shape[1]
        uniforms = self.noise.uniforms(f"{purpose}/{self.num_forwards}", DRAWS_PER_TOKEN * length)
        return uniforms.unflatten(1, (length, DRAWS_PER_TOKEN))


@SAMPLERS.register
class EditFlowSamplerConfig(SamplerConfig):
    """Edit Flows: insert, delete and substitute tokens at all places at once, step by step (Havasi et al. 2025)."""

    name: Literal["edit_flow"] = "edit_flow"
    num_steps: PositiveInt = 64
    """Steps of the even time grid. Edits of one step do not see each other; the paper takes thousands of steps."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the laws of inserted and substituted tokens; 0 takes the most likely one."""
    start_temperature: float | None = Field(default=None, ge=0)
    """Temperature at t = 0, from which it goes linearly to `temperature` at t = 1; null for the same at all times."""
    top_k: PositiveInt | None = None
    """Draw among this many most likely tokens; null for all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw among the most likely tokens that hold this much probability; null for all."""
    guidance: float = Field(default=0.0, gt=-1)
    """Weight w of guidance by the condition: twice the forwards. The paper takes 0.5 to 1.5. 0 is off."""
    guidance_rule: GuidanceRule = "naive"
    """How rates are guided: naive (the paper's), fixed, weighted."""
    guidance_limit: float = Field(default=3.0, ge=0)
    """Largest change of a log rate by guidance, in nats. Our choice."""
    correction_scale: float = Field(default=0.0, ge=0)
    """A in a_t = A t^b (1 - t)^c: how far a step overshoots, in steps, before it goes back by the reverse rates. 0 is off."""
    correction_power: float = Field(default=0.25, ge=0)
    """b."""
    correction_remaining_power: float = Field(default=0.25, ge=0)
    """c."""
    reverse_guidance: float | None = Field(default=None, gt=-1)
    """Guidance of the trained reverse rates; null for the forward one."""
    reverse_temperature: float | None = Field(default=None, ge=0)
    """Temperature of the trained reverse laws; null for the forward one."""

    def correction(self, time: float) -> float:
        """``a_t``."""
        factor = time**self.correction_power * (1 - time) ** self.correction_remaining_power
        return self.correction_scale * factor

    def temperature_at(self, time: float) -> float:
        """Linear between both ends."""
        start = self.temperature if self.start_temperature is None else self.start_temperature
        return start + (self.temperature - start) * time

    @property
    def forward_guidance(self) -> Guidance:
        """Of the forward rates."""
        return Guidance(self.guidance, self.guidance_rule, self.guidance_limit)

    @property
    def backward_guidance(self) -> Guidance:
        """Of the reverse rates."""
        scale = self.guidance if self.reverse_guidance is None else self.reverse_guidance
        return Guidance(scale, self.guidance_rule, self.guidance_limit)

    @property
    def setting(self) -> str:
        """The number of steps."""
        return f"num_steps {self.num_steps}"

    def compared(self) -> list[SamplerConfig]:
        """With a quarter of the steps, as set, and with four times as many."""
        return self.at("num_steps", max(1, self.num_steps // 4), self.num_steps, 4 * self.num_steps)

    def build(self, trained: Trained) -> EditFlow:
        """The sampler.

        Raises:
            ConfigError: the model was not trained with edit_flow, or has no reverse rates for a correction.
        """
        process = trained_process(trained, sampler=self.name)
        if self.correction_scale > 0 and (process.spreads or (process.start is not None and process.reverse is None)):
            raise ConfigError(
                "the model has no reverse rates, which a correction needs",
                where="sampler.correction_scale",
                found=self.correction_scale,
                expected="0",
                fix="train with objective.reverse=true, or from an empty start, both with spread_rate=0",
            )
        return EditFlow(self, process=process, trained=trained)
