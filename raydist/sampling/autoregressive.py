"""One token a forward, left to right, with cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from raydist.config.registries import SAMPLERS
from raydist.models.mask_spec import CachedMask
from raydist.sampling.base import CAUSAL_OBJECTIVES, Generation, Sampler, SamplerConfig, Trained
from raydist.sampling.drawing import draw_tokens, prompt_uniforms
from raydist.sampling.kv_cache import KvCache
from raydist.sampling.prefill import prefill


class Autoregressive(Sampler):
    """Ordinary decoding with the model's causal read-out.

    The forward over the prompt yields the first token, so ``num_forwards`` equals the number of tokens.
    """

    def __init__(self, config: AutoregressiveConfig, *, trained: Trained) -> None:
        self.config = config
        self.stop_ids = trained.stop_ids
        self.ids = trained.ids
        self.seed = trained.seed

    @torch.inference_mode()
    def generate(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Continues each prompt; rows that met a stop id leave the batch."""
        if not prompts:
            return []
        cache, hidden_BD = prefill(model, prompts, max_new_tokens=max_new_tokens)
        device = hidden_BD.device
        uniforms_BN = prompt_uniforms(prompts, seed=self.seed, num_positions=max_new_tokens, device=device)
        stop_ids = torch.tensor(self.stop_ids, dtype=torch.int64, device=device)
        drawn: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        for index in range(max_new_tokens):
            tokens_B1 = self._draw(model.head(hidden_BD)[:, None], uniforms_BN=uniforms_BN[live, index : index + 1])
            going_B = ~torch.isin(tokens_B1[:, 0], stop_ids)
            for row, token in zip(live, tokens_B1[:, 0].tolist(), strict=True):
                drawn[row].append(token)
            if index + 1 == max_new_tokens:
                break
            keep = going_B.nonzero()[:, 0]
            if len(keep) < len(live):
                live = [live[row] for row in keep.tolist()]
                if not live:
                    break
                cache.keep_rows(keep.cpu())
                tokens_B1 = tokens_B1[keep]
            hidden_BD = _next_hidden(model, tokens_B1, cache=cache)
        return [
            Generation(
                tokens=tokens,
                num_forwards=len(tokens),
                revealed_at=list(range(1, len(tokens) + 1)),
                stopped=tokens[-1] in self.stop_ids,
            )
            for tokens in drawn
        ]

    def _draw(self, logits_B1V: Tensor, *, uniforms_BN: Tensor) -> Tensor:
        logits_B1V = logits_B1V[..., : self.ids.vocab_size]
        if self.ids.mask is not None:
            logits_B1V[..., self.ids.mask] = -torch.inf
        return draw_tokens(
            logits_B1V,
            uniforms_BN=uniforms_BN,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
        )


def _next_hidden(model: Any, tokens_B1: Tensor, *, cache: KvCache) -> Tensor:
    """Feeds one token per row, keeps it in the cache, and returns its hidden state ``[B, D]``."""
    lengths_B = cache.lengths_B
    mask = CachedMask(cache_lengths_B=lengths_B, cache_width=cache.width, num_causal=1).to(tokens_B1.device)
    hidden_B1D = model.hidden(tokens_B1, lengths_B[:, None].to(tokens_B1.device), mask, cache=cache)
    cache.commit(torch.ones_like(lengths_B))
    return hidden_B1D[:, 0]


@SAMPLERS.register
class AutoregressiveConfig(SamplerConfig):
    """One token a forward, left to right."""

    name: Literal["autoregressive"] = "autoregressive"
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token; otherwise logits are divided by it."""
    top_k: PositiveInt | None = None
    """Draw among this many most likely tokens; null for all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw among the most likely tokens that hold this much probability; null for all."""

    def build(self, trained: Trained) -> Autoregressive:
        """The sampler; it never yields a mask, nor an id that only pads the tables.

        Raises:
            ConfigError: the model does not predict next tokens.
        """
        trained.require_objective(CAUSAL_OBJECTIVES, sampler=self.name)
        return Autoregressive(self, trained=trained)
