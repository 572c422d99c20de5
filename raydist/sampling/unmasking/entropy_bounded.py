"""As many positions as keep the error of drawing them independently below a bound.

Source: Ben-Hamu et al. 2025, "Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking",
arXiv 2505.24857, eq. 1 and Algorithm 1. Set Block Decoding uses it with the entropy proxy.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.registries import UNMASKING
from raydist.sampling.unmasking.base import (
    Proxy,
    Unmasking,
    at_positions,
    entropies_nats,
    error_proxy,
    in_float,
    reveal_order,
)


def sum_without_max(values: Tensor) -> Tensor:
    """``cumsum(values) - cummax(values)`` over the last axis for values >= 0, free of cancellation.

    By ``S_n - M_n = (S_{n-1} - M_{n-1}) + min(v_n, M_{n-1})`` it is a sum of non-negative numbers, so that it is
    non-decreasing in floating point as well.
    """
    before = torch.zeros_like(values)
    before[..., 1:] = values.cummax(dim=-1).values[..., :-1]
    return torch.minimum(values, before).cumsum(dim=-1)


@UNMASKING.register
class EntropyBounded(Unmasking):
    """The longest prefix of the most trusted positions whose entropies, less the largest, sum to at most gamma.

    The error of drawing tokens independently is their total correlation, which is at most the sum of their entropies
    minus the largest of them; the rule keeps that below ``gamma``. Masked positions are sorted by the error proxy, ties by
    position. (The paper does not say whether a temperature enters the entropies; here it does not.)
    """

    name: Literal["entropy_bounded"] = "entropy_bounded"
    gamma: float = Field(default=0.35, ge=0)
    """Entropy bound in nats: 0 is one uncertain position a forward, infinity all at once."""
    proxy: Proxy = "entropy"
    """The order in which positions are trusted."""

    @property
    def label(self) -> str:
        """``gamma 0.35``, and the proxy where it is not the entropy."""
        return f"gamma {self.gamma}" + ("" if self.proxy == "entropy" else f", proxy {self.proxy}")

    def reveal(self, logits_BkV: Tensor, *, masked_Bk: Tensor, order_uniforms_Bk: Tensor) -> Tensor:
        """See :class:`raydist.sampling.unmasking.base.Unmasking`; draws nothing."""
        logits_BkV = in_float(logits_BkV)
        entropies_Bk = entropies_nats(logits_BkV)
        errors_Bk = entropies_Bk if self.proxy == "entropy" else error_proxy(logits_BkV, proxy=self.proxy)
        order_Bk = reveal_order(errors_Bk, masked_Bk=masked_Bk)
        within_Bk = sum_without_max(entropies_Bk.gather(-1, order_Bk)) <= self.gamma
        return at_positions(within_Bk, order_Bk=order_Bk, masked_Bk=masked_Bk)
