"""A batch of growing texts whose last tokens may still change, and the two questions a corrector asks about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raydist.core.target_offsets import OFFSET_FEATURE, TargetOffsets
from raydist.models.mask_spec import CachedMask
from raydist.sampling.prefill import prefill


class CorrectableText:
    """Texts, the cache of their keys and values, and what each of them cost.

    The keys of a token depend on the offset of the target it was fed with. The cache holds those of offset +1 only, with
    which a text reads as in ordinary decoding, of a prefix of each row: ``cache.lengths_B`` tokens. A token that changes
    takes itself and all behind it out of the cache. The keys of a previous-token prediction, whose last prefix token has
    offset +2, live in scratch slots for one forward; the cached entry of that token is hidden by the mask meanwhile and
    is there again afterwards. So nothing is ever computed twice but tokens of the window.

    Book-keeping is on the CPU: one copy of B tokens a forward, as in every sampler here.

    Attributes:
        tokens_BT: prompt, then generated tokens, int64.
        lengths_B: tokens of each text, prompt included.
        prompt_lengths_B: tokens of each prompt.
        rows_B: index of the prompt that each row continues.
        num_forwards_B: forwards spent on each row.
        fixed_at_BT: the row's forward in which a generated token took its value; 0 where there is none yet.

    Args:
        model: the decoder.
        prompts: token ids.
        max_new_tokens: generated tokens per row.
        window: the last tokens that may change.
        offsets: the table that the model was trained with.
        rotary_positions: ``"content"`` or ``"slots"``, as in training.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        window: int,
        offsets: TargetOffsets,
        rotary_positions: str,
    ) -> None:
        self.model, self.offsets, self.rotary_positions = model, offsets, rotary_positions
        self.cache, self._hidden_BD = prefill(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            num_scratch=window,
            features={OFFSET_FEATURE: offsets.next_token_row},
        )
        self.device = self._hidden_BD.device
        self.prompt_lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        capacity = int(self.prompt_lengths_B.max()) + max_new_tokens
        self.tokens_BT = torch.tensor([[*prompt, *[0] * (capacity - len(prompt))] for prompt in prompts])
        self.fixed_at_BT = torch.zeros_like(self.tokens_BT)
        self.lengths_B = self.prompt_lengths_B.clone()
        self.rows_B = torch.arange(len(prompts))
        self.num_forwards_B = torch.ones_like(self.rows_B)

    def next_logits(self, needed_B: Tensor) -> Tensor:
        """Logits of the token behind each text, ``[B, V]``; right for the rows that need it.

        A row whose text is cached but for nothing costs no forward: its last hidden state is at hand.
        """
        counts_B = torch.where(needed_B, self.lengths_B - self.cache.lengths_B, 0)
        if bool((counts_B > 0).any()):
            sources_BN = self.cache.lengths_B[:, None] + torch.arange(int(counts_B.max()))
            offsets_BN = torch.ones_like(sources_BN)
            fresh_BD = self._last_hidden(sources_BN, sources_BN, offsets_BN, counts_B, cached_B=self.cache.lengths_B)
            self.cache.commit(counts_B)
            self._hidden_BD = torch.where((counts_B > 0)[:, None].to(self.device), fresh_BD, self._hidden_BD)
        logits_BV: Tensor = self.model.head(self._hidden_BD)
        return logits_BV

    def previous_logits(self, places_B: Tensor, needed_B: Tensor) -> Tensor:
        """Logits of the token at a place, given the tokens before it and those behind it, ``[B, V]``.

        One forward, of the tokens from the last one before the place (or from the first one that is not cached) to the end
        of the text, the place left out. Right for the rows that need it; there the place is not the text's last.
        """
        last_B = self.lengths_B - 1
        starts_B = torch.minimum(places_B - 1, self.cache.lengths_B)
        counts_B = torch.where(needed_B, last_B - starts_B, 0)
        slots_BN = starts_B[:, None] + torch.arange(int(counts_B.max()))
        sources_BN = slots_BN + (slots_BN >= places_B[:, None])
        targets_BN = sources_BN + 1 + (sources_BN + 1 == places_B[:, None])
        targets_BN = torch.where(sources_BN == last_B[:, None], places_B[:, None], targets_BN)
        offsets_BN = torch.where(sources_BN <= last_B[:, None], targets_BN - sources_BN, 1)
        positions_BN = sources_BN if self.rotary_positions == "content" else slots_BN
        hidden_BD = self._last_hidden(sources_BN, positions_BN, offsets_BN, counts_B, cached_B=starts_B)
        logits_BV: Tensor = self.model.head(hidden_BD)
        return logits_BV

    def append(self, tokens_B: Tensor, rows_B: Tensor) -> None:
        """Adds a token to some rows; ``rows_B`` is a bool mask."""
        self._write(self.lengths_B, tokens_B, rows_B)
        self.lengths_B = self.lengths_B + rows_B

    def replace(self, places_B: Tensor, tokens_B: Tensor, rows_B: Tensor) -> None:
        """Puts a token at a place of some rows; where it differs, what is cached from there on is forgotten."""
        changed_B = self._write(places_B, tokens_B, rows_B)
        self.cache.truncate(torch.where(changed_B, places_B, self.lengths_B))

    def drop_last(self, rows_B: Tensor) -> None:
        """Takes the last token off some rows."""
        self.lengths_B = self.lengths_B - rows_B.long()
        self.cache.truncate(self.lengths_B)

    def keep(self, kept_B: Tensor) -> None:
        """Forgets the rows where ``kept_B`` is False."""
        kept_R = kept_B.nonzero()[:, 0]
        self.cache.keep_rows(kept_R)
        self._hidden_BD = self._hidden_BD[kept_R.to(self.device)]
        for name in ("tokens_BT", "fixed_at_BT", "lengths_B", "prompt_lengths_B", "rows_B", "num_forwards_B"):
            setattr(self, name, getattr(self, name)[kept_R])

    def _write(self, places_B: Tensor, tokens_B: Tensor, rows_B: Tensor) -> Tensor:
        """Returns the rows, among those asked for, that did not hold the token there."""
        places_R, index_R = places_B[rows_B], rows_B.nonzero()[:, 0]
        new_R, first_R = tokens_B[rows_B], self.fixed_at_BT[index_R, places_R] == 0
        changed_R = first_R | (self.tokens_BT[index_R, places_R] != new_R)
        self.tokens_BT[index_R, places_R] = new_R
        self.fixed_at_BT[index_R[changed_R], places_R[changed_R]] = self.num_forwards_B[index_R[changed_R]]
        changed_B = torch.zeros_like(rows_B)
        changed_B[index_R] = changed_R
        return changed_B

    def _last_hidden(
        self, sources_BN: Tensor, positions_BN: Tensor, offsets_BN: Tensor, counts_B: Tensor, *, cached_B: Tensor
    ) -> Tensor:
        """One causal forward behind the first ``cached_B`` cached tokens; hidden state of each row's last fed token.

        Row b feeds its first ``counts_B[b]`` sources; what stands behind them is padding, and a row of padding alone
        costs nothing.
        """
        mask = CachedMask(cache_lengths_B=cached_B, cache_width=self.cache.width, num_causal=sources_BN.shape[1])
        tokens_BN = self.tokens_BT.gather(1, sources_BN.clamp(max=self.tokens_BT.shape[1] - 1))
        hidden_BND = self.model.hidden(
            tokens_BN.to(self.device),
            positions_BN.to(self.device),
            mask.to(self.device),
            cache=self.cache,
            features={OFFSET_FEATURE: self.offsets.rows(offsets_BN).to(self.device)},
        )
        self.num_forwards_B = self.num_forwards_B + (counts_B > 0)
        last_B = (counts_B - 1).clamp(min=0).to(self.device)
        hidden_BD: Tensor = hidden_BND[torch.arange(len(last_B), device=self.device), last_B]
        return hidden_BD
