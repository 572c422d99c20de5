"""Block after block of masks, behind an exact cache of the finished text: what the block samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from raydist.models.mask_spec import MaskSpec
from raydist.sampling.base import Generation, Sampler
from raydist.sampling.drawing import PromptNoise
from raydist.sampling.kv_cache import KvCache
from raydist.sampling.mask_state import MaskStates, Transcripts, Window


class MaskBehindCache(Protocol):
    """Makes the mask of one forward over ``[finished ; block]``."""

    def __call__(self, cache: KvCache, *, num_finished: int, num_block: int) -> MaskSpec:
        """Keys are the cached slots and then the tokens that are fed."""


class BlockReader:
    """The forwards of one batch of rows: its cache, and the finished block that is not in the cache yet.

    A finished block is encoded again, without masks in it, inside the first forward of the next block; only those keys and
    values are cached. So the cache is that of an encoding of the finished text alone, and no forward is spent on it.
    """

    def __init__(self, model: Any, cache: KvCache, *, mask: MaskBehindCache) -> None:
        self._model = model
        self._mask = mask
        self.cache = cache
        self._finished_BC: Tensor | None = None

    def finish(self, tokens_Bk: Tensor) -> None:
        """Says what the block became; the next forward encodes it."""
        self._finished_BC = tokens_Bk

    def keep_rows(self, rows_R: Tensor) -> None:
        """Forgets all other rows; int64."""
        self.cache.keep_rows(rows_R.cpu())
        if self._finished_BC is not None:
            self._finished_BC = self._finished_BC[rows_R]

    def logits(self, tokens_Bk: Tensor) -> Tensor:
        """One forward over a block, ``[B, k, V]``: position i of the block is read for token i."""
        _, hidden_BkD = self._hidden(tokens_Bk)
        logits_BkV: Tensor = self._model.head(hidden_BkD)
        return logits_BkV

    def _hidden(self, tokens_Bk: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the finished block, if one is pending, and of this one; caches the finished one."""
        finished_BC = tokens_Bk[:, :0] if self._finished_BC is None else self._finished_BC
        self._finished_BC = None
        num_finished, num_block = finished_BC.shape[1], tokens_Bk.shape[1]
        device, lengths_B = tokens_Bk.device, self.cache.lengths_B
        mask = self._mask(self.cache, num_finished=num_finished, num_block=num_block).to(device)
        positions_BN = (lengths_B[:, None] + torch.arange(num_finished + num_block)).to(device)
        hidden_BND = self._model.hidden(
            torch.cat([finished_BC, tokens_Bk], dim=1), positions_BN, mask, cache=self.cache
        )
        self.cache.commit(torch.full_like(lengths_B, num_finished))
        return hidden_BND[:, :num_finished], hidden_BND[:, num_finished:]


@dataclass(frozen=True)
class Start:
    """A batch after its prompts were encoded.

    Attributes:
        reader: with the cached part of the prompts.
        tails: the rest of each prompt, which opens the first block.
        num_forwards: forwards spent on each prompt.
        width: columns of tails and new tokens together; a multiple of the block size, or a last block that is shorter.
    """

    reader: BlockReader
    tails: list[list[int]]
    num_forwards: list[int]
    width: int


class BlockwiseSampler(Sampler, ABC):
    """Blocks of mask tokens, of which each forward reveals as many as the unmasking policy allows.

    Rows of a batch go through their blocks side by side, but what a row reveals depends on that row alone; rows that are
    complete or stopped leave the batch between blocks. ``num_forwards`` counts every forward of the model, the one over the
    prompt included, until a stop id is present and everything before it is revealed.
    """

    def __init__(self, states: MaskStates, *, block_size: int, seed: int) -> None:
        self.states = states
        self.block_size = block_size
        self.seed = seed

    @abstractmethod
    def start(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> Start:
        """Encodes the prompts."""

    @torch.inference_mode()
    def generate(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Continues each prompt block by block."""
        if not prompts:
            return []
        start = self.start(model, prompts, max_new_tokens=max_new_tokens)
        text = self._with_masks(start, prompts, max_new_tokens=max_new_tokens, device=next(model.parameters()).device)
        transcripts = Transcripts(start.num_forwards)
        for first in range(0, start.width, self.block_size):
            block = text.columns(first, first + self.block_size)
            revealed = self.states.reveal(block, logits_of=start.reader.logits)
            transcripts.add(revealed, new_Bk=block.new_Bk)
            start.reader.finish(revealed.tokens_Bk)
            going_B = text.new_Bk[:, first + self.block_size :].any(dim=-1) & ~revealed.stopped_B
            keep = going_B.nonzero()[:, 0]
            if not len(keep):
                break
            if len(keep) < len(going_B):
                transcripts.keep_rows(keep)
                start.reader.keep_rows(keep)
                text = text.rows(keep)
        return transcripts.generations(self.states.stop_ids)

    def _with_masks(
        self, start: Start, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, device: torch.device
    ) -> Window:
        """``[tail ; masks]`` of every row, with the prompt's i-th draw at its i-th new position."""
        tokens_BT = torch.tensor(
            [[*tail, *[self.states.mask_id] * (start.width - len(tail))] for tail in start.tails], device=device
        )
        lengths_B1 = torch.tensor([[len(tail)] for tail in start.tails], device=device)
        draw_BT = torch.arange(start.width, device=device) - lengths_B1
        new_BT = (draw_BT >= 0) & (draw_BT < max_new_tokens)
        draw_BT = draw_BT.clamp(0, max_new_tokens - 1)
        noise = PromptNoise(prompts, seed=self.seed, device=device)
        return Window(
            tokens_Bk=tokens_BT,
            new_Bk=new_BT,
            token_uniforms_Bk=noise.uniforms("token", max_new_tokens).gather(1, draw_BT),
            order_uniforms_Bk=noise.uniforms("order", max_new_tokens).gather(1, draw_BT),
        )
