"""Which masked positions to reveal after a forward: the entropy-bounded rule.

Source: Ben-Hamu et al. 2025, "Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking",
arXiv 2505.24857, eq. 1 and Algorithm 1. Set Block Decoding uses it with the entropy proxy.

Tokens revealed together are drawn independently of each other. The error of doing so is their total correlation,
which is at most the sum of their entropies minus the largest of them; the rule keeps that below ``gamma``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Proxy = Literal["entropy", "confidence", "margin"]


def entropies_nats(logits: Tensor) -> Tensor:
    """Entropy ``-sum_v p_v ln p_v`` of ``softmax(logits)``, over the last axis; logits of -inf count as p = 0."""
    log_p = torch.log_softmax(logits, dim=-1)
    return torch.special.entr(log_p.exp()).sum(dim=-1)


def error_proxy(logits: Tensor, *, proxy: Proxy) -> Tensor:
    """How far a position is to be trusted, over the last axis: lower is better (eq. 1).

    ``entropy``: H(p). ``confidence``: -max p. ``margin``: -(largest p - second largest p).
    """
    if proxy == "entropy":
        return entropies_nats(logits)
    top = torch.softmax(logits, dim=-1).topk(2, dim=-1).values
    return -top[..., 0] if proxy == "confidence" else top[..., 1] - top[..., 0]


def sum_without_max(values: Tensor) -> Tensor:
    """``cumsum(values) - cummax(values)`` over the last axis for values >= 0, free of cancellation.

    By ``S_n - M_n = (S_{n-1} - M_{n-1}) + min(v_n, M_{n-1})`` it is a sum of non-negative numbers, so that it is
    non-decreasing in floating point as well.
    """
    before = torch.zeros_like(values)
    before[..., 1:] = values.cummax(dim=-1).values[..., :-1]
    return torch.minimum(values, before).cumsum(dim=-1)


def entropy_bounded_reveal(logits_BkV: Tensor, *, masked_Bk: Tensor, gamma: float, proxy: Proxy = "entropy") -> Tensor:
    """The positions to reveal now, bool ``[B, k]``; each row on its own.

    The masked positions are sorted by the error proxy, ties by position; of that order the longest prefix is taken
    whose entropies, less the largest of them, sum to at most ``gamma``. A row with masked positions reveals one at
    least.

    Entropies are those of the softmax of the logits as they are, before any temperature: ``gamma`` then means the
    same at every temperature. (The paper is silent.)

    Args:
        logits_BkV: unnormalised, -inf for tokens that cannot be drawn.
        masked_Bk: True where a token is still to be revealed.
        gamma: nats, >= 0; 0 reveals one uncertain token a forward, infinity all at once.
        proxy: the order in which positions are trusted.
    """
    if logits_BkV.dtype not in (torch.float32, torch.float64):
        logits_BkV = logits_BkV.float()
    entropies_Bk = entropies_nats(logits_BkV)
    errors_Bk = entropies_Bk if proxy == "entropy" else error_proxy(logits_BkV, proxy=proxy)
    order_Bk = errors_Bk.masked_fill(~masked_Bk, torch.inf).argsort(dim=-1, stable=True)
    within_Bk = sum_without_max(entropies_Bk.gather(-1, order_Bk)) <= gamma
    return torch.zeros_like(masked_Bk).scatter(-1, order_Bk, within_Bk) & masked_Bk
