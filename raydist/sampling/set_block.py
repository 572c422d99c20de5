"""Set Block Decoding: several tokens a forward, in any order inside a block, behind an exactly cached causal prefix.

Source: Gat et al. 2025, "Set Block Decoding is a Language Model Inference Accelerator", arXiv 2509.04185, Algorithm 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from raydist.config.registries import SAMPLERS
from raydist.models.mask_spec import CachedMask
from raydist.sampling.base import Generation, Sampler, SamplerConfig, Trained
from raydist.sampling.drawing import draw_tokens, prompt_uniforms
from raydist.sampling.kv_cache import KvCache
from raydist.sampling.prefill import prefill
from raydist.sampling.unmasking import Proxy, entropy_bounded_reveal


@dataclass(frozen=True)
class DecodedBlock:
    """One block of every row of the batch.

    Attributes:
        tokens_Bk: token ids; the mask id only behind a stop id.
        revealed_at_Bk: the block's forward, counted from 1, in which a token was fixed; 0 where it never was.
        num_forwards_B: forwards until the row's block was complete or stopped.
        stopped_B: True where a stop id is present and everything before it is revealed.
    """

    tokens_Bk: Tensor
    revealed_at_Bk: Tensor
    num_forwards_B: Tensor
    stopped_B: Tensor


class SetBlock(Sampler):
    """Blocks of mask tokens, of which each forward reveals as many as the entropy bound allows.

    A finished block is encoded again, causally, inside the first forward of the next block: only those keys and values
    are cached, so the cache is that of a plain causal pass over the text, and no extra forward is spent. Tokens are
    read unshifted at the positions of the masks.

    ``num_forwards`` counts every forward of the model, the one over the prompt included, as for the autoregressive
    sampler; here that one yields no token, so n tokens at ``gamma = 0`` take n + 1 forwards. (The paper counts the
    forwards of the blocks alone.) It stops counting when a stop id is present and everything before it is revealed.
    The last block is as short as ``max_new_tokens`` leaves it.

    Rows of a batch go through their blocks side by side, but what a row reveals depends on that row alone; a row whose
    block is complete waits for the others, and waiting is not counted.
    """

    def __init__(self, config: SetBlockSamplerConfig, *, stop_ids: Sequence[int], mask_id: int, seed: int) -> None:
        self.config = config
        self.stop_ids = tuple(stop_ids)
        self.mask_id = mask_id
        self.seed = seed

    @torch.inference_mode()
    def generate(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Continues each prompt block by block; rows that met a stop id leave the batch between blocks."""
        if not prompts:
            return []
        cache, hidden_BD = prefill(model, prompts, max_new_tokens=max_new_tokens)
        uniforms_BN = prompt_uniforms(prompts, seed=self.seed, num_positions=max_new_tokens, device=hidden_BD.device)
        rows = [_Row() for _ in prompts]
        live = list(range(len(prompts)))
        finished_BC = torch.empty(len(prompts), 0, dtype=torch.int64, device=hidden_BD.device)
        for start in range(0, max_new_tokens, self.config.block_size):
            uniforms_Bk = uniforms_BN[live, start : start + self.config.block_size]
            block = self.decode_block(model, cache, finished_BC=finished_BC, uniforms_Bk=uniforms_Bk)
            for row, *parts in zip(
                live,
                block.tokens_Bk.tolist(),
                block.revealed_at_Bk.tolist(),
                block.num_forwards_B.tolist(),
                block.stopped_B.tolist(),
                strict=True,
            ):
                rows[row] = rows[row].followed_by(*parts)
            keep = (~block.stopped_B).nonzero()[:, 0]
            finished_BC = block.tokens_Bk[keep]
            if len(keep) < len(live):
                live = [live[row] for row in keep.tolist()]
                if not live:
                    break
                cache.keep_rows(keep.cpu())
        return [row.generation(self.stop_ids) for row in rows]

    def decode_block(self, model: Any, cache: KvCache, *, finished_BC: Tensor, uniforms_Bk: Tensor) -> DecodedBlock:
        """Decodes one block behind the cached text and ``finished_BC``, which goes into the cache on the way.

        Args:
            model: the decoder.
            cache: all text before ``finished_BC``.
            finished_BC: the block before this one, not cached yet; C = 0 for the first block.
            uniforms_Bk: the noise of the block's positions; its width is the block's.
        """
        tokens_Bk = torch.full_like(uniforms_Bk, self.mask_id, dtype=torch.int64)
        masked_Bk = torch.ones_like(tokens_Bk, dtype=torch.bool)
        revealed_at_Bk = torch.zeros_like(tokens_Bk)
        num_forwards_B, stopped_B = torch.zeros_like(tokens_Bk[:, 0]), torch.zeros_like(masked_Bk[:, 0])
        stop_ids = torch.tensor(self.stop_ids, dtype=torch.int64, device=tokens_Bk.device)
        forward = 0
        while True:
            logits_BkV = self._block_logits(model, cache, finished_BC=finished_BC, tokens_Bk=tokens_Bk)
            finished_BC = finished_BC[:, :0]
            forward += 1
            busy_B = masked_Bk.any(dim=-1) & ~stopped_B
            num_forwards_B = num_forwards_B + busy_B
            reveal_Bk = busy_B[:, None] & entropy_bounded_reveal(
                logits_BkV, masked_Bk=masked_Bk, gamma=self.config.gamma, proxy=self.config.proxy
            )
            drawn_Bk = draw_tokens(logits_BkV, uniforms_BN=uniforms_Bk, temperature=self.config.temperature)
            tokens_Bk = torch.where(reveal_Bk, drawn_Bk, tokens_Bk)
            revealed_at_Bk = revealed_at_Bk.masked_fill(reveal_Bk, forward)
            masked_Bk = masked_Bk & ~reveal_Bk
            known_prefix_Bk = masked_Bk.cumsum(dim=-1) == 0
            stopped_B = (torch.isin(tokens_Bk, stop_ids) & known_prefix_Bk).any(dim=-1)
            if not bool((masked_Bk.any(dim=-1) & ~stopped_B).any()):
                return DecodedBlock(tokens_Bk, revealed_at_Bk, num_forwards_B, stopped_B)

    def _block_logits(self, model: Any, cache: KvCache, *, finished_BC: Tensor, tokens_Bk: Tensor) -> Tensor:
        """One forward over ``[finished ; block]``; keeps the finished tokens in the cache. Logits ``[B, k, V]``."""
        num_causal, block_size = finished_BC.shape[1], tokens_Bk.shape[1]
        device, lengths_B = tokens_Bk.device, cache.lengths_B
        mask = CachedMask(
            cache_lengths_B=lengths_B, cache_width=cache.width, num_causal=num_causal, num_block=block_size
        ).to(device)
        positions_BN = (lengths_B[:, None] + torch.arange(num_causal + block_size)).to(device)
        hidden_BND = model.hidden(torch.cat([finished_BC, tokens_Bk], dim=1), positions_BN, mask, cache=cache)
        cache.commit(torch.full_like(lengths_B, num_causal))
        logits_BkV = model.head(hidden_BND[:, num_causal:])
        logits_BkV[..., self.mask_id] = -torch.inf
        return logits_BkV


@dataclass(frozen=True)
class _Row:
    """One prompt's blocks so far; the prompt's own forward is the first."""

    tokens: tuple[int, ...] = ()
    revealed_at: tuple[int, ...] = ()
    num_forwards: int = 1
    stopped: bool = False

    def followed_by(self, tokens: list[int], revealed_at: list[int], num_forwards: int, stopped: bool) -> _Row:
        return _Row(
            tokens=(*self.tokens, *tokens),
            revealed_at=(*self.revealed_at, *[self.num_forwards + forward for forward in revealed_at]),
            num_forwards=self.num_forwards + num_forwards,
            stopped=stopped,
        )

    def generation(self, stop_ids: Sequence[int]) -> Generation:
        end = len(self.tokens)
        if self.stopped:
            end = 1 + min(index for index, token in enumerate(self.tokens) if token in stop_ids)
        return Generation(
            tokens=list(self.tokens[:end]),
            num_forwards=self.num_forwards,
            revealed_at=list(self.revealed_at[:end]),
            stopped=self.stopped,
        )


@SAMPLERS.register
class SetBlockSamplerConfig(SamplerConfig):
    """Several tokens a forward inside a block of masks, bounded by their entropy (Set Block Decoding)."""

    name: Literal["set_block"] = "set_block"
    block_size: PositiveInt = 16
    """Mask tokens per block; the paper decodes with 16."""
    gamma: float = Field(default=0.35, ge=0)
    """Entropy bound in nats: 0 is one uncertain token a forward, larger is faster and less exact."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token; otherwise each token is drawn from its own softmax(logits / temperature)."""
    proxy: Proxy = "entropy"
    """The order in which positions are trusted."""

    def build(self, trained: Trained) -> SetBlock:
        """The sampler.

        Raises:
            ConfigError: the vocabulary has no mask id.
        """
        mask_id = trained.require_mask_id(sampler=self.name)
        return SetBlock(self, stop_ids=trained.stop_ids, mask_id=mask_id, seed=trained.seed)
