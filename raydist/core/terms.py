"""What an objective asks of the head, and what it gets back.

The vocabulary-sized logits exist only inside the head, one chunk at a time; objectives speak of positions and targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

TermKind = Literal["ce"]


@dataclass(frozen=True)
class HeadTerm:
    """One sum over positions: ``sum_t weights[t] * cost(hidden[positions[t]], targets[t])``.

    Attributes:
        name: names the term in metrics (``"ntp"``, ``"matp"``).
        positions_T: index into the hidden states flattened to ``[B * L, D]``, int64 ``[T]``; only positions that carry loss.
        targets_T: target token ids, int64 ``[T]``.
        weights_T: float32 ``[T]``, or None for all ones.
        kind: ``"ce"`` is ``-log softmax(logits)[target]``.
        head: the name of the model's head that is read.
        denominator: the name of the global count that the sum is divided by (see ``NoisedBatch.counts``).
    """

    name: str
    positions_T: Tensor
    targets_T: Tensor
    weights_T: Tensor | None
    kind: TermKind = "ce"
    head: str = "lm"
    denominator: str = "targets"

    def to(self, device: torch.device) -> HeadTerm:
        """The term with its tensors on a device."""
        return replace(
            self,
            positions_T=self.positions_T.to(device, non_blocking=True),
            targets_T=self.targets_T.to(device, non_blocking=True),
            weights_T=None if self.weights_T is None else self.weights_T.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class TermResult:
    """A term's value.

    Attributes:
        term: what was asked.
        loss_sum: the weighted sum, a float32 scalar that carries the gradient.
        losses_T: each position's cost before weighting, float32 ``[T]``, detached.
    """

    term: HeadTerm
    loss_sum: Tensor
    losses_T: Tensor
