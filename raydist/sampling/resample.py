"""Resample-Previous-Tokens: a window slides over the end of the text, and its tokens are drawn again given each other.

Source: Gat et al. 2025, "Corrector Sampling in Language Models", arXiv 2506.06215.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import Tensor

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.core.target_offsets import TargetOffsets
from raydist.sampling.base import Generation, Sampler, SamplerConfig, Trained
from raydist.sampling.correctable_text import CorrectableText
from raydist.sampling.drawing import PromptNoise, draw_tokens


class Resample(Sampler):
    """Decodes left to right, and goes back over the last w tokens.

    For each position of the window, ``iterations`` times::

        fill        x_n ~ p(. | x_<n)                               until the window holds w tokens
        previous    x_i ~ p(. | x_<i, x_{i+1} .. x_end)             for every i of the window but the last
        next        x_end ~ p(. | x_<end)                           the window's last token
        slide       by ``stride`` tokens

    Half an iteration is the ``previous`` part alone. A previous token is replaced only where the proposal's probability
    is above ``confidence_threshold``. With ``refresh = accepted`` a row without an accepted proposal keeps its last token.
    With ``iterations = 0`` this is autoregressive sampling, token by token and forward by forward.

    A stop id ends a row when it is in the window after the iterations, so it may be taken back before that; behind a stop
    id nothing is drawn, and the window is shorter there. Every forward of the model counts. A previous-token prediction
    is one forward of at most w tokens; the next part is a forward only where a token before it changed.

    ``revealed_at`` is the forward in which a token took the value that it kept. What a row draws depends on its prompt
    and on where its window stands, never on the batch.
    """

    def __init__(
        self,
        config: ResampleSamplerConfig,
        *,
        offsets: TargetOffsets,
        rotary_positions: str,
        trained: Trained,
    ) -> None:
        self.config = config
        self.offsets = offsets
        self.rotary_positions = rotary_positions
        self.stop_ids = torch.tensor(tuple(trained.stop_ids), dtype=torch.int64)
        self.ids = trained.ids
        self.seed = trained.seed

    @torch.inference_mode()
    def generate(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Continues each prompt; rows that are done leave the batch between windows."""
        if not prompts:
            return []
        text = CorrectableText(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            window=self.config.window,
            offsets=self.offsets,
            rotary_positions=self.rotary_positions,
        )
        noise = PromptNoise(prompts, seed=self.seed, device=text.device)
        rollout = _Rollout(self, text, noise=noise, max_new_tokens=max_new_tokens)
        generations: list[Generation | None] = [None] * len(prompts)
        while len(text.rows_B):
            rollout.fill()
            for half in range(round(2 * self.config.iterations)):
                if half % 2 == 0:
                    rollout.resample_previous(half)
                else:
                    rollout.resample_next(half)
            for row, generation in rollout.finish():
                generations[row] = generation
        return [generation for generation in generations if generation is not None]

    def draw(self, logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
        """Tokens ``[B]`` by temperature, top-k and top-p."""
        return draw_tokens(
            logits_BV[:, None],
            uniforms_BN=uniforms_B[:, None],
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
        )[:, 0]

    def propose(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """A previous token for each row, and whether its probability at temperature 1 passes the threshold."""
        greedy = self.config.previous == "greedy"
        tokens_B = logits_BV.argmax(dim=-1) if greedy else self.draw(logits_BV, uniforms_B)
        confidence_B = torch.softmax(logits_BV.double(), dim=-1).gather(1, tokens_B[:, None])[:, 0]
        return tokens_B, confidence_B > self.config.confidence_threshold


class _Rollout:
    """One call of the sampler: texts, where their windows start, and what was seen on the way."""

    def __init__(self, sampler: Resample, text: CorrectableText, *, noise: PromptNoise, max_new_tokens: int) -> None:
        self.sampler, self.config, self.text = sampler, sampler.config, text
        self.noise, self.max_new_tokens = noise, max_new_tokens
        self.starts_B = text.prompt_lengths_B
        self.accepted_B = torch.zeros_like(self.starts_B, dtype=torch.bool)
        self._uniforms: dict[str, Tensor] = {}
        self._snapshots: list[tuple[Tensor, ...]] = []

    def fill(self) -> None:
        """Draws next tokens until each row's window is full, its text is long enough, or it met a stop id."""
        text = self.text
        ends_B = torch.minimum(self.starts_B + self.config.window, text.prompt_lengths_B + self.max_new_tokens)
        open_B = torch.ones_like(self.accepted_B)
        while bool((drawing_B := open_B & (text.lengths_B < ends_B)).any()):
            tokens_B = self._draw_next(drawing_B, purpose="token", places_B=text.lengths_B)
            open_B = open_B & ~(drawing_B & torch.isin(tokens_B, self.sampler.stop_ids))

    def resample_previous(self, half: int) -> None:
        """Proposes all tokens of the windows but the last ones, from left to right."""
        text = self.text
        self.accepted_B = torch.zeros_like(self.accepted_B)
        for offset in range(self.config.window - 1):
            places_B = self.starts_B + offset
            paired_B = places_B < text.lengths_B - 1
            if not bool(paired_B.any()):
                break
            logits_BV = self._allowed(text.previous_logits(places_B, paired_B))
            uniforms_B = self._uniforms_at(f"previous/{half}/{offset}", self.starts_B)
            tokens_B, confident_B = (drawn.cpu() for drawn in self.sampler.propose(logits_BV, uniforms_B))
            taken_B = paired_B & confident_B
            text.replace(places_B, tokens_B, taken_B)
            self.accepted_B = self.accepted_B | taken_B
            self._record()

    def resample_next(self, half: int) -> None:
        """Draws the last tokens of the windows again."""
        paired_B = self.starts_B < self.text.lengths_B - 1
        rows_B = paired_B & self.accepted_B if self.config.refresh == "accepted" else paired_B
        if bool(rows_B.any()):
            self.text.drop_last(rows_B)
            self._draw_next(rows_B, purpose=f"next/{half}", places_B=self.starts_B)

    def finish(self) -> list[tuple[int, Generation]]:
        """Slides the windows; takes out the rows that hold a stop id or are long enough."""
        text = self.text
        inside_BT = torch.arange(text.tokens_BT.shape[1]) < text.lengths_B[:, None]
        inside_BT &= torch.arange(text.tokens_BT.shape[1]) >= text.prompt_lengths_B[:, None]
        stops_BT = inside_BT & torch.isin(text.tokens_BT, self.sampler.stop_ids)
        stopped_B = stops_BT.any(dim=1)
        full_B = text.lengths_B == text.prompt_lengths_B + self.max_new_tokens
        ends_B = torch.where(stopped_B, stops_BT.int().argmax(dim=1) + 1, text.lengths_B)
        done_B = stopped_B | full_B
        finished = [self._generation(index, int(ends_B[index]), bool(stopped_B[index])) for index in done_B.nonzero()]
        self.starts_B = torch.minimum(self.starts_B + self.config.stride, text.lengths_B)
        if finished:
            text.keep(~done_B)
            self.starts_B, self.accepted_B = self.starts_B[~done_B], self.accepted_B[~done_B]
        return finished

    def _draw_next(self, rows_B: Tensor, *, purpose: str, places_B: Tensor) -> Tensor:
        logits_BV = self._allowed(self.text.next_logits(rows_B))
        tokens_B = self.sampler.draw(logits_BV, self._uniforms_at(purpose, places_B)).cpu()
        self.text.append(tokens_B, rows_B)
        self._record()
        return tokens_B

    def _allowed(self, logits_BV: Tensor) -> Tensor:
        """Without the rows that a model may have beyond the vocabulary, and never the mask."""
        ids = self.sampler.ids
        logits_BV = logits_BV[:, : ids.vocab_size]
        if ids.mask is not None:
            logits_BV[:, ids.mask] = -torch.inf
        return logits_BV

    def _uniforms_at(self, purpose: str, places_B: Tensor) -> Tensor:
        """The rows' noise at places of their texts, one stream per purpose."""
        if purpose not in self._uniforms:
            self._uniforms[purpose] = self.noise.uniforms(purpose, self.max_new_tokens)
        columns_B = (places_B - self.text.prompt_lengths_B).clamp(max=self.max_new_tokens - 1)
        return self._uniforms[purpose][self.text.rows_B.to(self.text.device), columns_B.to(self.text.device)]

    def _record(self) -> None:
        if self.config.record_states and self.config.iterations > 0:
            text = self.text
            state = (text.rows_B, text.num_forwards_B, text.prompt_lengths_B, text.lengths_B, text.tokens_BT.clone())
            self._snapshots.append(state)

    def _states(self, row: int) -> list[list[int]]:
        """The row's generated tokens after each of its forwards."""
        states: dict[int, list[int]] = {}
        for rows_B, forwards_B, starts_B, ends_B, tokens_BT in self._snapshots:
            for index in (rows_B == row).nonzero()[:, 0].tolist():
                states[int(forwards_B[index])] = tokens_BT[index, int(starts_B[index]) : int(ends_B[index])].tolist()
        return [states[forward] for forward in sorted(states)]

    def _generation(self, index: Tensor, end: int, stopped: bool) -> tuple[int, Generation]:
        text, row = self.text, int(self.text.rows_B[index])
        generated = slice(int(text.prompt_lengths_B[index]), end)
        return row, Generation(
            tokens=text.tokens_BT[index][0, generated].tolist(),
            num_forwards=int(text.num_forwards_B[index]),
            revealed_at=text.fixed_at_BT[index][0, generated].tolist(),
            stopped=stopped,
            states=self._states(row) if self._snapshots else None,
        )


@SAMPLERS.register
class ResampleSamplerConfig(SamplerConfig):
    """Left to right, going back over the last tokens (Resample-Previous-Tokens)."""

    name: Literal["resample"] = "resample"
    window: int = Field(default=2, ge=2)
    """Last tokens that may change, w; at most that of the training."""
    iterations: float = Field(default=1.0, ge=0)
    """How often a window is gone over, k; halves end with the previous tokens. 0 is autoregressive sampling."""
    confidence_threshold: float = Field(default=0.9, ge=0, le=1)
    """A previous token is replaced where the new one's probability is above this; 0 accepts all, 1 none."""
    previous: Literal["greedy", "sampled"] = "greedy"
    """How previous tokens are proposed: the most likely one, or drawn like next tokens."""
    refresh: Literal["always", "accepted"] = "always"
    """When the window's last token is drawn again: in any case, or only where a previous token was accepted. Our choice:
    with accepted, last tokens that make the model sure of the one before are drawn anew more often than others."""
    stride: PositiveInt = 1
    """Tokens that the window slides by, at most its width; our choice."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token; otherwise logits are divided by it."""
    top_k: PositiveInt | None = None
    """Draw among this many most likely tokens; null for all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw among the most likely tokens that hold this much probability; null for all."""
    record_states: bool = True
    """Keep the text after each forward, for the animation; costs memory quadratic in the number of tokens."""

    @field_validator("iterations")
    @classmethod
    def _whole_or_half(cls, iterations: float) -> float:
        if not (2 * iterations).is_integer():
            raise ValueError("a multiple of 0.5")
        return iterations

    @model_validator(mode="after")
    def _windows_leave_no_gap(self) -> ResampleSamplerConfig:
        if self.stride > self.window:
            raise ValueError(f"stride={self.stride} is above window={self.window}")
        return self

    @property
    def setting(self) -> str:
        """The number of iterations."""
        return f"iterations {self.iterations:g}"

    def compared(self) -> list[SamplerConfig]:
        """Without going back, with the previous token only, and with whole iterations."""
        return self.at("iterations", 0.0, 0.5, 1.0, 2.0)

    def build(self, trained: Trained) -> Resample:
        """The sampler.

        Raises:
            ConfigError: the model was trained for something else, or for shorter windows.
        """
        objective = trained.objective or {}
        if objective.get("name") != "resample":
            raise ConfigError(
                "this model cannot predict previous tokens",
                where="sampler",
                found=f"a model of objective {objective.get('name', 'unknown')}",
                expected="a model that was trained with objective resample",
                fix="use --sampler autoregressive, or train with objective.name=resample",
            )
        if self.window > objective["window"]:
            raise ConfigError(
                "the window is wider than any that the model has seen",
                where="sampler.window",
                found=self.window,
                expected=f"at most {objective['window']}, the window of the training",
            )
        return Resample(
            self,
            offsets=TargetOffsets(objective["window"]),
            rotary_positions=objective["rotary_positions"],
            trained=trained,
        )
