"""A batch of texts with a gap of fixed length each: what is given stays, what is in the gap is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydist.core.errors import ConfigError
from raydist.models.mask_spec import FullMask


@dataclass(frozen=True)
class Canvas:
    """Rows ``[prefix ; gap ; suffix ; padding]``; all gaps have the same length N, the rest may differ.

    Attributes:
        tokens_BL: the given tokens; 0 in the gap and in the padding.
        given_BL: True where a token is given.
        columns_BN: where the gap lies in each row.
        lengths_B: tokens of each row without its padding.
    """

    tokens_BL: Tensor
    given_BL: Tensor
    columns_BN: Tensor
    lengths_B: Tensor

    @classmethod
    def of(
        cls,
        prefixes: Sequence[Sequence[int]],
        suffixes: Sequence[Sequence[int]],
        *,
        num_new_tokens: int,
        max_positions: int,
        device: torch.device,
    ) -> Canvas:
        """Lays the texts out.

        Raises:
            ConfigError: a row is longer than the model's positions.
        """
        rows = [[*prefix, *[0] * num_new_tokens, *suffix] for prefix, suffix in zip(prefixes, suffixes, strict=True)]
        longest = max(len(row) for row in rows)
        if longest > max_positions:
            raise ConfigError(
                "the given text and the new tokens are longer than the model's positions",
                where="num_new_tokens",
                found=f"{longest} tokens together",
                expected=f"at most {max_positions}",
                fix="shorten the text, or ask for fewer new tokens",
            )
        tokens_BL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
        starts_B = torch.tensor([len(prefix) for prefix in prefixes])
        lengths_B = torch.tensor([len(row) for row in rows])
        columns_L = torch.arange(longest)
        in_gap_BL = (columns_L >= starts_B[:, None]) & (columns_L < starts_B[:, None] + num_new_tokens)
        return cls(
            tokens_BL=tokens_BL.to(device),
            given_BL=((columns_L < lengths_B[:, None]) & ~in_gap_BL).to(device),
            columns_BN=(starts_B[:, None] + torch.arange(num_new_tokens)).to(device),
            lengths_B=lengths_B.to(device),
        )

    @property
    def in_gap_BL(self) -> Tensor:
        """Where tokens are generated, bool."""
        everywhere_BN = torch.ones_like(self.columns_BN, dtype=torch.bool)
        return torch.zeros_like(self.given_BL).scatter(1, self.columns_BN, everywhere_BN)

    def positions(self) -> Tensor:
        """Rotary positions, ``[1, L]``."""
        return torch.arange(self.tokens_BL.shape[1], device=self.tokens_BL.device)[None]

    def mask(self, rows_R: Tensor) -> FullMask:
        """Attention for some rows: everything sees everything, but the padding sees and is seen by itself alone."""
        padding_RL = self.positions() >= self.lengths_B[rows_R, None]
        documents_RL = padding_RL.to(torch.int32) if bool(padding_RL.any()) else None
        return FullMask(length=self.tokens_BL.shape[1], documents_BL=documents_RL)
