"""The times at which the reverse process itself would reveal each position."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from raydist.config.registries import UNMASKING
from raydist.sampling.unmasking.base import Unmasking, reveal_first


@UNMASKING.register
class FirstHitting(Unmasking):
    """The reverse process of masked diffusion by its hitting times: one position a forward, or a grid of steps.

    A masked position is data by time t with probability ``kappa_t``, independently of all others, so the ``kappa`` at
    which it is hit is uniform on [0, 1], whatever the schedule; drawing it once per position and revealing positions in
    that order simulates the process in continuous time, without a time-step error (the first-hitting sampler of Zheng et
    al. 2024). The order is uniformly random; the model needs no time, because its exact answer does not depend on it.

    With ``num_steps`` the positions hit inside one of that many equal intervals of ``kappa`` go together: the ancestral
    sampler with ``num_steps`` steps (MDLM, arXiv 2406.07524) under the schedule that is linear in ``kappa``. An interval
    without a hit costs no forward. A sampler that goes block by block runs the process anew in each block.
    """

    name: Literal["first_hitting"] = "first_hitting"
    num_steps: PositiveInt | None = None
    """Equal steps of kappa; null for one position a forward."""

    def reveal(self, logits_BkV: Tensor, *, masked_Bk: Tensor, order_uniforms_Bk: Tensor) -> Tensor:
        """See :class:`raydist.sampling.unmasking.base.Unmasking`; reads no logits."""
        if self.num_steps is None:
            return reveal_first(order_uniforms_Bk, masked_Bk=masked_Bk, number=1)
        interval_Bk = (order_uniforms_Bk * self.num_steps).floor().masked_fill(~masked_Bk, torch.inf)
        return (interval_Bk == interval_Bk.amin(dim=-1, keepdim=True)) & masked_Bk
