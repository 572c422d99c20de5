"""Set Block Decoding: several tokens a forward, in any order inside a block, behind an exactly cached causal prefix.

Source: Gat et al. 2025, "Set Block Decoding is a Language Model Inference Accelerator", arXiv 2509.04185, Algorithm 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import PositiveInt

from raydist.config.registries import SAMPLERS
from raydist.models.mask_spec import CachedMask
from raydist.sampling.autoregressive import AutoregressiveConfig
from raydist.sampling.base import SamplerConfig, Trained
from raydist.sampling.blockwise import BlockReader, BlockwiseSampler, Start
from raydist.sampling.kv_cache import KvCache
from raydist.sampling.mask_state import MaskStateSamplerConfig
from raydist.sampling.prefill import prefill


class SetBlock(BlockwiseSampler):
    """Blocks of masks behind a causal cache; tokens are read unshifted at the positions of the masks.

    A finished block is encoded again causally, so the cache is that of a plain causal pass over the text. The forward over
    the prompt yields no token, so n tokens one by one take n + 1 forwards. (The paper counts the forwards of the blocks
    alone.) The last block is as short as ``max_new_tokens`` leaves it.
    """

    def start(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> Start:
        """Caches the whole prompts, causally."""
        cache, _ = prefill(model, prompts, max_new_tokens=max_new_tokens)
        return Start(
            reader=BlockReader(model, cache, mask=_causal_then_block),
            tails=[[] for _ in prompts],
            num_forwards=[1] * len(prompts),
            width=max_new_tokens,
        )


def _causal_then_block(cache: KvCache, *, num_finished: int, num_block: int) -> CachedMask:
    return CachedMask(
        cache_lengths_B=cache.lengths_B, cache_width=cache.width, num_causal=num_finished, num_block=num_block
    )


@SAMPLERS.register
class SetBlockSamplerConfig(MaskStateSamplerConfig):
    """Several tokens a forward inside a block of masks behind a causal prefix (Set Block Decoding)."""

    name: Literal["set_block"] = "set_block"
    block_size: PositiveInt = 16
    """Mask tokens per block; the paper decodes with 16, and with the entropy_bounded policy."""

    def compared(self) -> list[SamplerConfig]:
        """One token a forward with the causal read-out of the same model, then blocks at several bounds."""
        return [AutoregressiveConfig(temperature=self.temperature), *super().compared()]

    def build(self, trained: Trained) -> SetBlock:
        """The sampler.

        Raises:
            ConfigError: the vocabulary has no mask id, or the model was trained for another sampler.
        """
        states = self.states(trained, objectives=frozenset({"set_block"}))
        return SetBlock(states, block_size=self.block_size, seed=trained.seed)
