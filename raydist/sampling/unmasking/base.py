"""The contract of an unmasking policy, and what policies measure of a position's distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from raydist.config.base import StrictModel

Proxy = Literal["entropy", "confidence", "margin"]


class Unmasking(StrictModel, ABC):
    """A policy: which masked positions are revealed after a forward. Registered under its ``name``.

    Positions revealed together are drawn independently of each other, each from its own distribution; that is the only
    error a policy can make with exact conditionals, so one position a forward samples the joint law exactly, in any order.

    A policy keeps no state and treats each row on its own, so what else is in the batch never matters. It reads the
    softmax of the logits as they are, before any temperature: a threshold then means the same at every temperature.
    """

    name: str

    @property
    def label(self) -> str:
        """The policy with its settings in a few words, as ``top_k k 2 proxy entropy``."""
        return " ".join([self.name, *(f"{name} {value}" for name, value in self.model_dump(exclude={"name"}).items())])

    @abstractmethod
    def reveal(self, logits_BkV: Tensor, *, masked_Bk: Tensor, order_uniforms_Bk: Tensor) -> Tensor:
        """The positions to reveal now, bool ``[B, k]``: masked ones only, and at least one in a row that has any.

        Args:
            logits_BkV: unnormalised, -inf for tokens that cannot be drawn.
            masked_Bk: True where a token is still to be revealed.
            order_uniforms_Bk: one uniform in [0, 1) per position, the same in every forward, for policies that draw the
                order; independent of the uniforms that draw the tokens.
        """


def in_float(logits: Tensor) -> Tensor:
    """The logits in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def entropies_nats(logits: Tensor) -> Tensor:
    """Entropy ``-sum_v p_v ln p_v`` of ``softmax(logits)``, over the last axis; logits of -inf count as p = 0."""
    log_p = torch.log_softmax(logits, dim=-1)
    return torch.special.entr(log_p.exp()).sum(dim=-1)


def confidences(logits: Tensor) -> Tensor:
    """Largest probability of ``softmax(logits)``, over the last axis."""
    return (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp()


def error_proxy(logits: Tensor, *, proxy: Proxy) -> Tensor:
    """How far a position is to be trusted, over the last axis: lower is better.

    ``entropy``: H(p). ``confidence``: -max p. ``margin``: -(largest p - second largest p). Ben-Hamu et al. 2025,
    arXiv 2505.24857, eq. 1.
    """
    if proxy == "entropy":
        return entropies_nats(logits)
    if proxy == "confidence":
        return -confidences(logits)
    top = torch.softmax(logits, dim=-1).topk(2, dim=-1).values
    return top[..., 1] - top[..., 0]


def reveal_order(errors_Bk: Tensor, *, masked_Bk: Tensor) -> Tensor:
    """Positions by ascending error, int64 ``[B, k]``: masked ones first, ties by position."""
    return errors_Bk.masked_fill(~masked_Bk, torch.inf).argsort(dim=-1, stable=True)


def at_positions(chosen_Bk: Tensor, *, order_Bk: Tensor, masked_Bk: Tensor) -> Tensor:
    """From ``chosen``, given in the order of :func:`reveal_order`, to positions; those that are not masked are False."""
    return torch.zeros_like(masked_Bk).scatter(-1, order_Bk, chosen_Bk) & masked_Bk


def reveal_first(errors_Bk: Tensor, *, masked_Bk: Tensor, number: int) -> Tensor:
    """The ``number`` masked positions of least error, bool ``[B, k]``; all of them where there are fewer."""
    order_Bk = reveal_order(errors_Bk, masked_Bk=masked_Bk)
    first_Bk = (torch.arange(order_Bk.shape[-1], device=order_Bk.device) < number).expand_as(order_Bk)
    return at_positions(first_Bk, order_Bk=order_Bk, masked_Bk=masked_Bk)
