"""The cost of a linear head without its logits.

With T positions and V tokens the logits would be a ``[T, V]`` tensor, several of them with their gradients, and the
largest thing in memory. Here positions go through the head in chunks, and each chunk's gradient is taken while its
logits are at hand; what stays is a ``[T, D]`` and a ``[V, D]`` gradient. Matrix products are in the dtype of the
hidden states, the softmax and the accumulation of the weight gradient in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raydist.models.head_costs import LogitCost, softmax_dtype

_CHUNK_LOGITS_CPU, _MAX_CHUNK_LOGITS_CPU = 2**20, 2**24
_CHUNK_LOGITS_CUDA = 2**27
_GOOD_CHUNK_POSITIONS = 128
MAX_LOG_RATE = 20.0


def linear_loss(
    hidden_TD: Tensor,
    *,
    weight_VD: Tensor,
    cost: LogitCost,
    weights_T: Tensor | None = None,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum_t weights[t] * cost(weight @ hidden[t])``.

    Args:
        hidden_TD: hidden states of the positions that carry loss; T may be 0.
        weight_VD: the head.
        cost: of each position given its logits.
        weights_T: float32, or None for all ones.
        chunk_positions: positions whose logits are in memory at once; by default :func:`default_chunk_positions`.

    Returns:
        The sum, a scalar that carries the gradient, and each position's unweighted cost ``[T]``, detached; float32.
    """
    if chunk_positions is None:
        chunk_positions = default_chunk_positions(weight_VD.shape[0], is_cuda=hidden_TD.is_cuda)
    if weights_T is None:
        weights_T = hidden_TD.new_ones(hidden_TD.shape[0], dtype=softmax_dtype(hidden_TD))
    else:
        weights_T = weights_T.to(softmax_dtype(hidden_TD))
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        loss_sum, losses_T = _LinearLoss.apply(hidden_TD, weight_VD, weights_T, cost, chunk_positions)
        return loss_sum, losses_T
    losses_T = torch.empty_like(weights_T)
    for chunk in _chunks(hidden_TD.shape[0], chunk_positions):
        losses_T[chunk] = cost.values(hidden_TD[chunk] @ weight_VD.t(), chunk)
    return torch.dot(losses_T, weights_T), losses_T


def default_chunk_positions(vocab_size: int, *, is_cuda: bool) -> int:
    """As many positions as keep a chunk of float32 logits within a budget that no vocabulary exceeds.

    512 MiB on CUDA. On CPU 4 MiB, which stay in the cache; for a large vocabulary 128 positions, for which the products
    are fastest, as long as they fit in 64 MiB (V = 128 Ki).
    """
    if is_cuda:
        return max(1, _CHUNK_LOGITS_CUDA // vocab_size)
    wanted = max(_GOOD_CHUNK_POSITIONS, _CHUNK_LOGITS_CPU // vocab_size)
    return max(1, min(wanted, _MAX_CHUNK_LOGITS_CPU // vocab_size))


def linear_poisson(
    hidden_TD: Tensor, *, weight_KD: Tensor, exposure_TK: Tensor, counts_TK: Tensor, weights_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``sum_t weights[t] sum_k exposure[t, k] exp(o[t, k]) - counts[t, k] o[t, k]`` with ``o = weight @ hidden[t]``.

    A narrow head: all of it at once, in float32 (float64 for a model in float64). Above ``MAX_LOG_RATE`` the exponential
    goes on as its tangent, so an outlier gives a finite cost and a gradient that still pulls it back, where a clamp would
    have none.

    Returns:
        The sum, a scalar that carries the gradient, and each position's unweighted cost ``[T]``, detached.
    """
    dtype = softmax_dtype(hidden_TD)
    log_rates_TK = hidden_TD.to(dtype) @ weight_KD.to(dtype).t()
    capped_TK = log_rates_TK.clamp(max=MAX_LOG_RATE)
    rates_TK = capped_TK.exp() * (1 + (log_rates_TK - capped_TK))
    losses_T = (exposure_TK * rates_TK - counts_TK * log_rates_TK).sum(-1)
    weighted_T = losses_T if weights_T is None else losses_T * weights_T
    return weighted_T.sum(), losses_T.detach()


class _LinearLoss(torch.autograd.Function):
    """Forward computes the gradients for an upstream gradient of one; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, weights_T: Tensor, cost: LogitCost, chunk_positions: int
    ) -> tuple[Tensor, Tensor]:
        losses_T = torch.empty_like(weights_T)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=weights_T.dtype)
        for chunk in _chunks(hidden_TD.shape[0], chunk_positions):
            hidden_CD, weights_C1 = hidden_TD[chunk], weights_T[chunk, None]
            losses_T[chunk], grad_logits_CV = cost.values_and_gradient(hidden_CD @ weight_VD.t(), chunk)
            # The position's weight goes to the narrow [C, D] operands instead of the logits' gradient.
            grad_logits_CV = grad_logits_CV.to(hidden_CD.dtype)
            grad_hidden_TD[chunk] = (grad_logits_CV @ weight_VD) * weights_C1
            _add_product(grad_weight_VD, grad_logits_CV, (hidden_CD * weights_C1).to(hidden_CD.dtype))
            del grad_logits_CV  # before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(losses_T)
        return torch.dot(losses_T, weights_T), losses_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        grad_weight_VD = (grad_weight_VD * grads[0]).to(ctx.weight_dtype)
        return (grad_hidden_TD * grads[0]).to(grad_hidden_TD.dtype), grad_weight_VD, None, None, None


def _add_product(total_VD: Tensor, grad_logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """``total += grad_logits.T @ hidden`` with a total of at least float32."""
    if hidden_CD.dtype == total_VD.dtype:
        total_VD.addmm_(grad_logits_CV.t(), hidden_CD)
    elif hidden_CD.is_cuda:
        total_VD += torch.mm(grad_logits_CV.t(), hidden_CD, out_dtype=torch.float32)
    else:
        total_VD += grad_logits_CV.t() @ hidden_CD


def _chunks(num_positions: int, chunk_positions: int) -> list[slice]:
    return [slice(start, start + chunk_positions) for start in range(0, num_positions, chunk_positions)]
