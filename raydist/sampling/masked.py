"""Masked diffusion decoding: a whole text with masks in it, answered with attention to both sides.

Source: Nie et al. 2025, "LLaDA", arXiv 2502.09992 (blocks, order by confidence); Ye et al. 2025, "Dream", arXiv 2508.15487
(shifted read-out); Sahoo et al. 2024, "MDLM", arXiv 2406.07524.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.models.mask_spec import FullMask
from raydist.sampling.base import Generation, Sampler, Trained
from raydist.sampling.canvas import Canvas
from raydist.sampling.drawing import PromptNoise
from raydist.sampling.mask_state import MaskStates, MaskStateSamplerConfig, Transcripts, Window, shifted
from raydist.sampling.prefill import check_prompts


class Masked(Sampler):
    """The prompt, ``max_new_tokens`` masks, and a forward over all of it for each set of revealed positions.

    With ``block_size`` only the leftmost unfinished block of the new positions may be revealed, while the masks behind it
    are seen (semi-autoregressive); without, any new position may. A row stops when a stop id is present and everything
    before it is revealed. There is no cache: every token sees every other, so nothing that was computed stays valid.

    Rows of different lengths are padded behind their end; padding is a document of its own, so a row never feels its batch.
    """

    def __init__(self, states: MaskStates, *, block_size: int | None, seed: int, shift: bool) -> None:
        self.states = states
        self.block_size = block_size
        self.seed = seed
        self.shift = shift

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Continues each prompt."""
        check_prompts(prompts, max_new_tokens=max_new_tokens, max_positions=model.config.max_positions)
        return self._fill(model, prompts, [[]] * len(prompts), num_new_tokens=max_new_tokens, states=self.states)

    def infill(
        self, model: Any, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]], *, num_new_tokens: int
    ) -> list[Generation]:
        """Fills gaps of exactly ``num_new_tokens``; a stop id inside a gap is a token like others.

        Raises:
            ConfigError: a text longer than the model's positions, or an empty prefix for a shifted read-out, which has
                nothing to read the first token from.
        """
        for index, prefix in enumerate(prefixes):
            if self.shift and not prefix:
                raise ConfigError(
                    "a gap at the start of a text cannot be filled by a model with a shifted read-out",
                    where=f"prefix {index}",
                    found="no tokens",
                    expected="at least one token",
                    fix="begin with the beginning-of-text token",
                )
        states = replace(self.states, stop_ids=())
        return self._fill(model, prefixes, suffixes, num_new_tokens=num_new_tokens, states=states)

    @torch.inference_mode()
    def _fill(
        self,
        model: Any,
        prefixes: Sequence[Sequence[int]],
        suffixes: Sequence[Sequence[int]],
        *,
        num_new_tokens: int,
        states: MaskStates,
    ) -> list[Generation]:
        if not prefixes:
            return []
        device = next(model.parameters()).device
        canvas = Canvas.of(
            prefixes,
            suffixes,
            num_new_tokens=num_new_tokens,
            max_positions=model.config.max_positions,
            device=device,
        )
        gap = self._masks(prefixes, suffixes, num_new_tokens=num_new_tokens, device=device)
        transcripts = Transcripts([0] * len(prefixes))
        live_B = torch.arange(len(prefixes), device=device)
        step = self.block_size or max(1, num_new_tokens)
        for first in range(0, num_new_tokens, step):
            columns = slice(first, min(first + step, num_new_tokens))
            block = gap.columns(columns.start, columns.stop)
            forward = _Forward(
                model,
                tokens_BL=canvas.tokens_BL[live_B],
                columns_BN=canvas.columns_BN[live_B],
                mask=canvas.mask(live_B),
                gap_BN=gap.tokens_Bk,
                columns=columns,
                shift=self.shift,
            )
            revealed = states.reveal(block, logits_of=forward.logits)
            transcripts.add(revealed, new_Bk=block.new_Bk)
            keep = (~revealed.stopped_B).nonzero()[:, 0]
            if not len(keep):
                break
            transcripts.keep_rows(keep)
            gap = replace(gap, tokens_Bk=forward.with_block(revealed.tokens_Bk)).rows(keep)
            live_B = live_B[keep]
        return transcripts.generations(states.stop_ids)

    def _masks(
        self,
        prefixes: Sequence[Sequence[int]],
        suffixes: Sequence[Sequence[int]],
        *,
        num_new_tokens: int,
        device: torch.device,
    ) -> Window:
        """The gaps before the first forward; a gap's noise belongs to what is on both sides of it."""
        masks = [self.states.mask_id] * num_new_tokens
        texts = [[*left, *masks, *right] if right else left for left, right in zip(prefixes, suffixes, strict=True)]
        noise = PromptNoise(texts, seed=self.seed, device=device)
        token_uniforms_BN = noise.uniforms("token", num_new_tokens)
        return Window(
            tokens_Bk=torch.full_like(token_uniforms_BN, self.states.mask_id, dtype=torch.int64),
            new_Bk=torch.ones_like(token_uniforms_BN, dtype=torch.bool),
            token_uniforms_Bk=token_uniforms_BN,
            order_uniforms_Bk=noise.uniforms("order", num_new_tokens),
        )


@dataclass(frozen=True)
class _Forward:
    """Forwards over the whole texts of some rows, while one block of their gaps changes."""

    model: Any
    tokens_BL: Tensor
    columns_BN: Tensor
    mask: FullMask
    gap_BN: Tensor
    columns: slice
    shift: bool

    def with_block(self, tokens_Bk: Tensor) -> Tensor:
        """The gaps with these tokens in the block, ``[B, N]``."""
        return torch.cat([self.gap_BN[:, : self.columns.start], tokens_Bk, self.gap_BN[:, self.columns.stop :]], dim=1)

    def logits(self, tokens_Bk: Tensor) -> Tensor:
        """Logits of the block, ``[B, k, V]``."""
        tokens_BL = self.tokens_BL.scatter(1, self.columns_BN, self.with_block(tokens_Bk))
        positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        hidden_BLD = self.model.hidden(tokens_BL, positions_BL, self.mask)
        read_Bk1 = (self.columns_BN[:, self.columns] - int(self.shift))[..., None]
        logits_BkV: Tensor = self.model.head(hidden_BLD.gather(1, read_Bk1.expand(-1, -1, hidden_BLD.shape[-1])))
        return logits_BkV


@SAMPLERS.register
class MaskedSamplerConfig(MaskStateSamplerConfig):
    """A whole text with masks, several tokens a forward anywhere in it, or block by block (MDLM, LLaDA, Dream)."""

    name: Literal["masked"] = "masked"
    block_size: PositiveInt | None = None
    """Reveal this many positions before the next ones (semi-autoregressive); null for the whole length at once."""
    shift: bool | None = None
    """Read token i at position i - 1; null for what the training did."""

    def build(self, trained: Trained) -> Masked:
        """The sampler.

        Raises:
            ConfigError: the vocabulary has no mask id, or the model was trained for another sampler or from another source.
        """
        path = (trained.objective or {}).get("path")
        source = None if path is None else path.get("source", {}).get("name")
        if path is not None and source != "mask":
            raise ConfigError(
                "the model was trained with noise that is no mask",
                where="sampler",
                found=f"{self.name} on a model with the path {path['name']}" + (f", source {source}" if source else ""),
                fix="use --sampler discrete_flow",
            )
        states = self.states(trained, objectives=frozenset({"masked", "discrete_flow"}))
        return Masked(states, block_size=self.block_size, seed=trained.seed, shift=shifted(self.shift, trained))
