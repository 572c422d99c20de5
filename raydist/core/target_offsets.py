"""How far ahead of its own token a position predicts, as rows of a feature table.

Shared by the objective that trains the table and the sampler that reads it (:mod:`raydist.objectives.resample`,
:mod:`raydist.sampling.resample`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

OFFSET_FEATURE = "offset"


@dataclass(frozen=True)
class TargetOffsets:
    """Rows of the table for offsets ``tau - sigma``: the place of the token to predict minus that of the input token.

    When disjoint windows of w adjacent tokens are permuted, an offset lies between ``-(w - 1)``, from the last token of a
    window to its first, and ``2 w - 1``, from the first token of a window to the last of the next window.

    Attributes:
        window: w, at least 2.
    """

    window: int

    @property
    def num_values(self) -> int:
        """Rows of the table, ``3 w - 1``."""
        return 3 * self.window - 1

    def rows(self, offsets: Tensor) -> Tensor:
        """The table's row of each offset, int64, of the same shape."""
        return offsets + (self.window - 1)

    @property
    def next_token_row(self) -> int:
        """The row of offset +1, which is ordinary next-token prediction."""
        return self.window
