"""A fixed number of positions a forward: the most trusted ones, or random ones."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from raydist.config.registries import UNMASKING
from raydist.sampling.unmasking.base import Proxy, Unmasking, error_proxy, in_float, reveal_first


@UNMASKING.register
class TopK(Unmasking):
    """The k most trusted positions a forward (LLaDA's low-confidence remasking, Dream's orders).

    The papers speak of a number of steps: ``k`` is the number of new tokens divided by it.
    """

    name: Literal["top_k"] = "top_k"
    k: PositiveInt = 1
    """Positions a forward."""
    proxy: Proxy = "confidence"
    """The order in which positions are trusted."""

    def reveal(self, logits_BkV: Tensor, *, masked_Bk: Tensor, order_uniforms_Bk: Tensor) -> Tensor:
        """See :class:`raydist.sampling.unmasking.base.Unmasking`; draws nothing."""
        errors_Bk = error_proxy(in_float(logits_BkV), proxy=self.proxy)
        return reveal_first(errors_Bk, masked_Bk=masked_Bk, number=self.k)


@UNMASKING.register
class RandomOrder(Unmasking):
    """k positions a forward, in a uniformly random order."""

    name: Literal["random"] = "random"
    k: PositiveInt = 1
    """Positions a forward."""

    def reveal(self, logits_BkV: Tensor, *, masked_Bk: Tensor, order_uniforms_Bk: Tensor) -> Tensor:
        """See :class:`raydist.sampling.unmasking.base.Unmasking`; reads no logits."""
        return reveal_first(order_uniforms_Bk, masked_Bk=masked_Bk, number=self.k)
