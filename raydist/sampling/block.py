"""Block diffusion decoding: masked diffusion inside a block, behind an exact cache of the finished blocks.

Source: Arriola et al. 2025, "Block Diffusion", arXiv 2503.09573.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import override

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.models.mask_spec import BlockCausalMask, CachedBlockMask
from raydist.sampling.base import Trained
from raydist.sampling.blockwise import BlockReader, BlockwiseSampler, Start
from raydist.sampling.kv_cache import KvCache
from raydist.sampling.mask_state import MaskStates, MaskStateSamplerConfig, shifted
from raydist.sampling.prefill import check_prompts


class Block(BlockwiseSampler):
    """Blocks of masks behind a block-causal cache, on the grid of blocks that training used.

    Blocks are counted from the start of the text: the whole blocks of a prompt are encoded in one forward, each token
    seeing its block and all before it; what is left of the prompt opens the first block that is decoded. A finished block
    is encoded again, bidirectionally, inside the first forward of the next one, so the cache is that of one block-causal
    pass over the text. A block that reaches beyond ``max_new_tokens`` is decoded with masks behind its last new token,
    which stay masks and are not returned.

    A prompt shorter than a block costs no forward of its own. With ``shift`` the first token of a block is read at the last
    token of the finished text, which sees nothing of the block, so it is revealed before the others may be; blocks of one
    token are then autoregressive decoding.
    """

    def __init__(self, states: MaskStates, *, block_size: int, seed: int, shift: bool) -> None:
        super().__init__(states, block_size=block_size, seed=seed)
        self.shift = shift

    def start(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> Start:
        """Caches the whole blocks of the prompts."""
        check_prompts(prompts, max_new_tokens=max_new_tokens, max_positions=model.config.max_positions)
        size = self.block_size
        cached = [len(prompt) // size * size for prompt in prompts]
        tails = [list(prompt[length:]) for prompt, length in zip(prompts, cached, strict=True)]
        most = max(len(tail) for tail in tails) + max_new_tokens
        width = -(-most // size) * size
        cache = KvCache(batch_size=len(prompts), capacity=max(cached) + width)
        last_BD = _encode_blocks(model, prompts, cached=cached, block_size=size, cache=cache)
        reader = (
            ShiftedBlockReader(model, cache, last_BD=last_BD)
            if self.shift
            else BlockReader(model, cache, mask=_finished_then_current)
        )
        return Start(reader=reader, tails=tails, num_forwards=[int(length > 0) for length in cached], width=width)


class ShiftedBlockReader(BlockReader):
    """Reads token i at position i - 1, as an autoregressive model does, so for the first token of a block at the last
    token of the finished text.
    """

    def __init__(self, model: Any, cache: KvCache, *, last_BD: Tensor) -> None:
        super().__init__(model, cache, mask=_finished_then_current)
        self._last_BD = last_BD

    @override
    def keep_rows(self, rows_R: Tensor) -> None:
        super().keep_rows(rows_R)
        self._last_BD = self._last_BD[rows_R]

    @override
    def logits(self, tokens_Bk: Tensor) -> Tensor:
        finished_BCD, hidden_BkD = self._hidden(tokens_Bk)
        if finished_BCD.shape[1]:
            self._last_BD = finished_BCD[:, -1]
        logits_BkV: Tensor = self._model.head(torch.cat([self._last_BD[:, None], hidden_BkD[:, :-1]], dim=1))
        return logits_BkV


def _finished_then_current(cache: KvCache, *, num_finished: int, num_block: int) -> CachedBlockMask:
    return CachedBlockMask(
        cache_lengths_B=cache.lengths_B, cache_width=cache.width, num_finished=num_finished, num_current=num_block
    )


def _encode_blocks(
    model: Any, prompts: Sequence[Sequence[int]], *, cached: Sequence[int], block_size: int, cache: KvCache
) -> Tensor:
    """Caches the first ``cached[b]`` tokens of each prompt, whole blocks, in one forward.

    Returns:
        The hidden state at each prompt's last cached token, ``[B, D]``; zeros where none is, which nothing reads: the first
        token of such a text is given.
    """
    device = next(model.parameters()).device
    longest = max(cached)
    if longest == 0:
        return next(model.parameters()).new_zeros(len(prompts), model.config.width)
    tokens_BL = torch.tensor(
        [[*prompt[:length], *[0] * (longest - length)] for prompt, length in zip(prompts, cached, strict=True)]
    )
    positions_BL = torch.arange(longest).expand_as(tokens_BL)
    mask = BlockCausalMask(length=longest, block_size=block_size)
    hidden_BLD = model.hidden(tokens_BL.to(device), positions_BL.to(device), mask, cache=cache)
    lengths_B = torch.tensor(cached)
    cache.commit(lengths_B)
    last_B11 = (lengths_B - 1).clamp(min=0).to(device)[:, None, None]
    last_BD: Tensor = hidden_BLD.gather(1, last_B11.expand(-1, 1, hidden_BLD.shape[-1]))[:, 0]
    return last_BD


@SAMPLERS.register
class BlockSamplerConfig(MaskStateSamplerConfig):
    """Block by block, several tokens a forward inside a block, finished blocks in an exact cache (BD3-LM)."""

    name: Literal["block"] = "block"
    block_size: PositiveInt | None = None
    """Tokens per block; null for the block size of the training."""
    shift: bool | None = None
    """Read token i at position i - 1; null for what the training did."""

    def build(self, trained: Trained) -> Block:
        """The sampler.

        Raises:
            ConfigError: the vocabulary has no mask id, the model was trained for another sampler, or the block size is
                neither given nor known from the training.
        """
        states = self.states(trained, objectives=frozenset({"block"}))
        block_size = (trained.objective or {}).get("block_size") if self.block_size is None else self.block_size
        if block_size is None:
            raise ConfigError(
                "the block size is not known",
                where="sampling.sampler.block_size",
                found="a model that the block objective of raydist did not train",
                expected="the block size of its training",
                fix="set it: block_size=16",
            )
        shift = shifted(self.shift, trained)
        states = replace(states, first_token_first=shift)
        return Block(states, block_size=block_size, seed=trained.seed, shift=shift)
