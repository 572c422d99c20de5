"""What a decoder says after closed covers: short forwards behind the keys of the tokens that are settled."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydist.models.mask_spec import CachedMask
from raydist.sampling.kv_cache import KvCache
from raydist.sampling.prefill import prefill
from raydist.sampling.text_bytes.covers import TokenLaw


class CachedLaw:
    """Token laws of several texts at once.

    A row's cache holds the tokens that all its covers share; the few that may still be segmented otherwise, most often
    those of the current word, are fed anew in each forward. Rows with several closed covers go through a forward of their
    own, on copies of their caches.

    Args:
        model: a decoder in evaluation mode.
        bases: the tokens at the start of each row, at least one.
        ids_S: token id of each entry of the laws.
        stop_ids: tokens whose probabilities add up to that of the end.
        num_new: tokens that may be added to a row, at most.
        num_pending: tokens that may be unsettled at the start, at most.
    """

    def __init__(
        self,
        model: Any,
        bases: Sequence[Sequence[int]],
        *,
        ids_S: NDArray[np.int64],
        stop_ids: Sequence[int],
        num_new: int,
        num_pending: int,
    ) -> None:
        self.model = model
        self._ids_S, self._stop_ids = torch.from_numpy(ids_S), torch.tensor(stop_ids, dtype=torch.int64)
        self._bases = [list(base) for base in bases]
        # each row's cache begins one token early, so that the law after the base has a token to be read from
        scratch = num_new + num_pending + 1
        self._cache, _ = prefill(model, self._bases, max_new_tokens=num_new, num_scratch=scratch)
        self._cache.truncate(self._cache.lengths_B - 1)
        self.num_forwards_B = [1] * len(self._bases)

    def after(
        self, covers_B: Sequence[Sequence[tuple[int, ...]]], *, num_forced_B: Sequence[int]
    ) -> list[list[TokenLaw]]:
        """The laws after the given covers of each row.

        Args:
            covers_B: ids after the base, of each cover of each row.
            num_forced_B: how many first ids all covers of the row share, now and later.
        """
        laws_B: list[list[TokenLaw]] = [[] for _ in covers_B]
        for row in (row for row, covers in enumerate(covers_B) if covers):
            self.num_forwards_B[row] += 1
        single = [row for row, covers in enumerate(covers_B) if len(covers) == 1]
        if single:
            fed = [self._fed(row, covers[0]) if len(covers) == 1 else [0] for row, covers in enumerate(covers_B)]
            hidden_BD = self._forward(fed, cache=self._cache)
            for row, law in zip(single, self._laws(hidden_BD[single]), strict=True):
                laws_B[row] = [law]
            settled_B = self._cache.lengths_B.clone()
            settled_B[single] = torch.tensor([len(self._bases[row]) + num_forced_B[row] for row in single])
            self._cache.commit((settled_B - self._cache.lengths_B).clamp(min=0))
        several = [(row, cover) for row, covers in enumerate(covers_B) if len(covers) > 1 for cover in covers]
        if several:
            copied = copy.copy(self._cache)
            copied.keep_rows(torch.tensor([row for row, _ in several]))
            hidden_RD = self._forward([self._fed(row, cover) for row, cover in several], cache=copied)
            for (row, _), law in zip(several, self._laws(hidden_RD), strict=True):
                laws_B[row].append(law)
        return laws_B

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forgets all other rows."""
        self._cache.keep_rows(torch.tensor(rows))
        self._bases = [self._bases[row] for row in rows]
        self.num_forwards_B = [self.num_forwards_B[row] for row in rows]

    def _fed(self, row: int, cover: tuple[int, ...]) -> list[int]:
        """The tokens of a cover that are not in the row's cache."""
        return [*self._bases[row], *cover][int(self._cache.lengths_B[row]) :]

    def _forward(self, fed: Sequence[Sequence[int]], *, cache: KvCache) -> Tensor:
        """The hidden state at the last token of each row, ``[R, D]``; nothing is kept in the cache."""
        longest = max(map(len, fed))
        device = next(self.model.parameters()).device
        tokens_RL = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in fed], device=device)
        positions_RL = (cache.lengths_B[:, None] + torch.arange(longest)).to(device)
        mask = CachedMask(cache_lengths_B=cache.lengths_B, cache_width=cache.width, num_causal=longest).to(device)
        hidden_RLD = self.model.hidden(tokens_RL, positions_RL, mask, cache=cache)
        last_R = torch.tensor([len(tokens) - 1 for tokens in fed], device=device)
        return hidden_RLD[torch.arange(len(fed), device=device), last_R]

    def _laws(self, hidden_RD: Tensor) -> list[TokenLaw]:
        log_probs_RV = torch.log_softmax(self.model.head(hidden_RD).double(), dim=-1)
        text_RS = log_probs_RV[:, self._ids_S.to(log_probs_RV.device)].cpu().numpy()
        end_R = log_probs_RV[:, self._stop_ids.to(log_probs_RV.device)].logsumexp(dim=-1).tolist()
        return [TokenLaw(text_S, end) for text_S, end in zip(text_RS, end_R, strict=True)]
