"""Positions whose most likely token is likely enough: a threshold on each, or one that grows with their number.

Source: Wu et al. 2025, "Fast-dLLM", arXiv 2505.22618.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.registries import UNMASKING
from raydist.sampling.unmasking.base import Unmasking, at_positions, confidences, in_float, reveal_order


@UNMASKING.register
class ConfidenceThreshold(Unmasking):
    """Every position whose largest probability exceeds a threshold, and always the most confident one."""

    name: Literal["confidence_threshold"] = "confidence_threshold"
    threshold: float = Field(default=0.9, ge=0, le=1)
    """0 reveals all at once, 1 one position a forward."""

    def reveal(self, logits_BkV: Tensor, *, masked_Bk: Tensor, order_uniforms_Bk: Tensor) -> Tensor:
        """See :class:`raydist.sampling.unmasking.base.Unmasking`; draws nothing."""
        confidences_Bk = confidences(in_float(logits_BkV))
        best_B1 = confidences_Bk.masked_fill(~masked_Bk, -torch.inf).argmax(dim=-1, keepdim=True)
        return (confidences_Bk > self.threshold).scatter(-1, best_B1, True) & masked_Bk


@UNMASKING.register
class Factor(Unmasking):
    """The largest n most confident positions with ``(n + 1) (1 - c_n) < factor``, and always the most confident one.

    ``c_n`` is the n-th largest confidence: the more positions go together, the surer the least sure of them must be. The
    left side grows with n, so counting the n that satisfy it finds the largest.
    """

    name: Literal["factor"] = "factor"
    factor: float = Field(default=1.0, ge=0)
    """0 reveals one position a forward, infinity all at once. The default is our choice: two positions need confidences
    above 2/3, four above 4/5."""

    def reveal(self, logits_BkV: Tensor, *, masked_Bk: Tensor, order_uniforms_Bk: Tensor) -> Tensor:
        """See :class:`raydist.sampling.unmasking.base.Unmasking`; draws nothing."""
        confidences_Bk = confidences(in_float(logits_BkV))
        order_Bk = reveal_order(-confidences_Bk, masked_Bk=masked_Bk)
        count_k = torch.arange(1, masked_Bk.shape[-1] + 1, device=masked_Bk.device)
        doubt_Bk = 1 - confidences_Bk.gather(-1, order_Bk)
        within_Bk = ((count_k + 1) * doubt_Bk < self.factor) | (count_k == 1)
        return at_positions(within_Bk, order_Bk=order_Bk, masked_Bk=masked_Bk)
