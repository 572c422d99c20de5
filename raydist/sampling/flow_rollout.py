"""The Markov chain of a flow sampler on one batch: jumps, corrector updates, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydist.core.token_ids import TokenIds
from raydist.paths.base import JumpNoise, Path
from raydist.paths.mixture import MixturePath
from raydist.sampling.base import Generation
from raydist.sampling.canvas import Canvas
from raydist.sampling.denoiser import Denoiser
from raydist.sampling.drawing import PromptNoise
from raydist.sampling.flow_clock import FlowClock
from raydist.sampling.noise_prediction import NoisePrediction


@dataclass
class History:
    """What the tokens of a canvas were, update by update.

    Attributes:
        revealed_at_BL: the forward, counted from 1, after which a token was last changed.
        num_forwards_B: forwards spent on each row.
        states: after each update, the tokens ``[B, L]`` and which rows were run for it, bool ``[B]``; None where they are
            not kept.
    """

    revealed_at_BL: Tensor
    num_forwards_B: Tensor
    states: list[tuple[Tensor, Tensor]] | None

    def add(self, before_BL: Tensor, after_BL: Tensor, *, num_forwards_B: Tensor) -> None:
        """Takes in one update and the forwards that each row spent on it."""
        self.num_forwards_B = self.num_forwards_B + num_forwards_B
        now_B1 = self.num_forwards_B.clamp(min=1)[:, None]
        self.revealed_at_BL = torch.where(after_BL != before_BL, now_B1, self.revealed_at_BL)
        if self.states is not None:
            self.states.append((after_BL, num_forwards_B > 0))

    def generations(self, tokens_BL: Tensor, *, canvas: Canvas, stop_ids: Sequence[int]) -> list[Generation]:
        """What became of the gaps in the end, cut after the first stop id."""
        rows = zip(
            tokens_BL.gather(1, canvas.columns_BN).tolist(),
            self.revealed_at_BL.gather(1, canvas.columns_BN).tolist(),
            self.num_forwards_B.tolist(),
            self._states_of_rows(canvas),
            strict=True,
        )
        generations = []
        for tokens, revealed_at, num_forwards, states in rows:
            stops = [index for index, token in enumerate(tokens) if token in stop_ids]
            end = stops[0] + 1 if stops else len(tokens)
            generations.append(
                Generation(
                    tokens=tokens[:end],
                    num_forwards=num_forwards,
                    revealed_at=revealed_at[:end],
                    stopped=bool(stops),
                    states=None if states is None else [state[:end] for state in states],
                )
            )
        return generations

    def _states_of_rows(self, canvas: Canvas) -> list[list[list[int]] | None]:
        """The gap of each row after each update that the row was run for."""
        if self.states is None:
            return [None] * len(canvas.columns_BN)
        states_BUN = torch.stack([tokens_BL.gather(1, canvas.columns_BN) for tokens_BL, _ in self.states], dim=1)
        run_BU = torch.stack([run_B for _, run_B in self.states], dim=1)
        return [states_UN[run_U].tolist() for states_UN, run_U in zip(states_BUN, run_BU, strict=True)]


class FlowRollout:
    """One batch on its way from the source to data; the state is ``tokens_BL``.

    Args:
        model: a decoder in evaluation mode.
        path: what the chain follows.
        clock: what the model is told of the time.
        canvas: the given text and its gaps.
        noise: of the prompts.
        ids: vocabulary size and mask id.
        guidance: w, see :class:`raydist.sampling.denoiser.Denoiser`.
        shift: position i is read from the hidden state of position i - 1.
        keep_states: whether the history holds the tokens after each update.
    """

    def __init__(
        self,
        model: Any,
        *,
        path: Path,
        clock: FlowClock,
        canvas: Canvas,
        noise: PromptNoise,
        ids: TokenIds,
        guidance: float,
        shift: bool,
        keep_states: bool,
    ) -> None:
        self.path = path.in_context(canvas.tokens_BL, given_BL=canvas.given_BL)
        self.clock, self.canvas, self.noise = clock, canvas, noise
        self.in_gap_BL = canvas.in_gap_BL
        source_BL = self._draw_source(canvas.tokens_BL, purpose="flow/source")
        self.denoiser = Denoiser(
            model=model,
            canvas=canvas,
            null_BL=source_BL,
            guidance=guidance,
            shift=shift,
            vocab_size=ids.vocab_size,
            mask_id=ids.mask,
        )
        self.tokens_BL = torch.where(self.in_gap_BL, source_BL, canvas.tokens_BL)
        self.history = History(
            revealed_at_BL=torch.ones_like(self.tokens_BL),
            num_forwards_B=torch.zeros_like(canvas.lengths_B),
            states=[] if keep_states else None,
        )

    def jump(
        self,
        start: float,
        stop: float,
        *,
        corrector: float,
        noise_prediction: bool,
        temperature: float,
        purpose: str,
    ) -> None:
        """One step of the chain from time ``start`` to ``stop``.

        Args:
            start: where the step begins.
            stop: where it ends; 1 sets every token to its clean one.
            corrector: ``c_t``.
            noise_prediction: the backward velocity is that of ``p_{0|t}``, not that of the source; with the mask source they
                are the same.
            temperature: of the draws of clean tokens.
            purpose: names the step's noise.
        """
        step: dict[str, Any] = {
            "start_time_BL": self._constant(start),
            "stop_time_BL": self._constant(stop),
            "corrector_BL": self._constant(corrector) if corrector > 0.0 else None,
            "noise": self._jump_noise(purpose),
        }
        draw: dict[str, Any] = {"time": start, "temperature": temperature, "purpose": purpose}
        if noise_prediction and corrector > 0.0 and self.path.absorbing_id is None:
            assert isinstance(self.path, MixturePath)  # the configuration refuses other paths
            kernel = NoisePrediction(self.path)
            clean_BL, num_forwards_B = self._draw_clean(kernel.may_jump(self.tokens_BL, **step), **draw)
            refills = self._jump_noise(f"{purpose}/refill")
            after_BL = kernel.jump(self.tokens_BL, clean_BL=clean_BL, refills=refills, **step)
        else:
            clean_BL, num_forwards_B = self._draw_clean(self.path.may_jump(self.tokens_BL, **step), **draw)
            after_BL = self.path.jump(self.tokens_BL, clean_BL=clean_BL, **step)
        self._move_to(after_BL, num_forwards_B)

    def refresh(self, time: float, *, share: float, temperature: float, purpose: str) -> None:
        """A corrector update at frozen time: each position with probability ``share`` draws x1, then ``x_t ~ p_t(. | x1)``.

        This is ``alpha (u_t - backward u_t)`` at frozen t (Gat et al. 2024) up to its speed, for any path: x1 given x_t,
        then x_t given x1, is a step of a Gibbs sampler of their joint law.
        """
        chosen_BL = self._uniforms(f"{purpose}/whether") < share
        clean_BL, num_forwards_B = self._draw_clean(chosen_BL, time=time, temperature=temperature, purpose=purpose)
        drawn_BL = self.path.corrupt(
            clean_BL,
            start_BL=self._draw_source(clean_BL, purpose=f"{purpose}/source"),
            time_BL=self._constant(time),
            uniforms_BL=self._uniforms(f"{purpose}/where"),
        )
        self._move_to(torch.where(chosen_BL, drawn_BL, self.tokens_BL), num_forwards_B)

    def _draw_clean(self, wanted_BL: Tensor, *, time: float, temperature: float, purpose: str) -> tuple[Tensor, Tensor]:
        """Clean tokens where wanted, and the forwards of each row. What is data by now is its own clean token."""
        wanted_BL = wanted_BL & self.in_gap_BL
        if self.path.absorbing_id is not None:
            wanted_BL = wanted_BL & (self.tokens_BL == self.path.absorbing_id)
        clean_BL = self.denoiser.draw(
            self.tokens_BL,
            wanted_BL=wanted_BL,
            uniforms_BL=self._uniforms(f"{purpose}/clean"),
            time=self.clock.model_time(time),
            temperature=temperature,
        )
        return clean_BL, wanted_BL.any(dim=1) * self.denoiser.num_forwards

    def _draw_source(self, clean_BL: Tensor, *, purpose: str) -> Tensor:
        return self.path.draw_start(clean_BL, uniforms_BL=self._uniforms(purpose))

    def _jump_noise(self, purpose: str) -> JumpNoise:
        return JumpNoise(whether=self._uniforms(f"{purpose}/whether"), where=self._uniforms(f"{purpose}/where"))

    def _move_to(self, after_BL: Tensor, num_forwards_B: Tensor) -> None:
        after_BL = torch.where(self.in_gap_BL, after_BL, self.tokens_BL)
        self.history.add(self.tokens_BL, after_BL, num_forwards_B=num_forwards_B)
        self.tokens_BL = after_BL

    def _uniforms(self, purpose: str) -> Tensor:
        return self.noise.uniforms(purpose, self.canvas.tokens_BL.shape[1])

    def _constant(self, value: float) -> Tensor:
        return torch.full((1, 1), value, dtype=torch.float64, device=self.canvas.tokens_BL.device)
