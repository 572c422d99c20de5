"""Cross entropy of a linear head without its logits.

With T positions and V tokens the logits would be a ``[T, V]`` tensor, several of them with their gradients, and the
largest thing in memory. Here positions go through the head in chunks, and each chunk's gradient is taken while its
logits are at hand; what stays is a ``[T, D]`` and a ``[V, D]`` gradient. Matrix products are in the dtype of the
hidden states, the softmax and the accumulation of the weight gradient in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS_CPU, _CHUNK_LOGITS_CUDA = 2**20, 2**27
_MIN_CHUNK_POSITIONS = 128


def linear_cross_entropy(
    hidden_TD: Tensor,
    *,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum_t weights[t] * -log softmax(weight @ hidden[t])[targets[t]]``.

    Args:
        hidden_TD: hidden states of the positions that carry loss; T may be 0.
        weight_VD: the head.
        targets_T: token ids, int64.
        weights_T: float32, or None for all ones.
        chunk_positions: positions whose logits are in memory at once; by default as many as keep the logits of a chunk
            near 4 MiB on CPU and 512 MiB on CUDA.

    Returns:
        The sum, a scalar that carries the gradient, and each position's unweighted cost ``[T]``, detached; float32.
    """
    if chunk_positions is None:
        chunk_logits = _CHUNK_LOGITS_CUDA if hidden_TD.is_cuda else _CHUNK_LOGITS_CPU
        chunk_positions = max(_MIN_CHUNK_POSITIONS, chunk_logits // weight_VD.shape[0])
    dtype = _softmax_dtype(hidden_TD)
    weights_T = torch.ones_like(targets_T, dtype=dtype) if weights_T is None else weights_T.to(dtype)
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        loss_sum, losses_T = _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, weights_T, chunk_positions)
        return loss_sum, losses_T
    losses_T = torch.empty_like(weights_T)
    for chunk in _chunks(targets_T.shape[0], chunk_positions):
        log_probs_CV = _log_probs(hidden_TD[chunk], weight_VD)
        losses_T[chunk] = -log_probs_CV.gather(1, targets_T[chunk, None])[:, 0]
    return torch.dot(losses_T, weights_T), losses_T


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients for an upstream gradient of one; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor, chunk_positions: int
    ) -> tuple[Tensor, Tensor]:
        losses_T = torch.empty_like(weights_T)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=weights_T.dtype)
        for chunk in _chunks(targets_T.shape[0], chunk_positions):
            hidden_CD, targets_C1, weights_C1 = hidden_TD[chunk], targets_T[chunk, None], weights_T[chunk, None]
            logits_CV = hidden_CD @ weight_VD.t()
            probs_CV = torch.softmax(logits_CV, dim=-1, dtype=weights_T.dtype)
            # The largest probability is 1 / sum(exp(logits - largest)), and at least 1 / V: its logarithm is accurate.
            losses_T[chunk] = logits_CV.amax(-1) - probs_CV.amax(-1).log() - logits_CV.gather(1, targets_C1)[:, 0]
            # d loss / d logits is softmax - onehot; the position's weight goes to the narrow [C, D] operands instead.
            grad_logits_CV = probs_CV.scatter_add_(1, targets_C1, -torch.ones_like(weights_C1))
            grad_logits_CV = grad_logits_CV.to(hidden_CD.dtype)
            grad_hidden_TD[chunk] = (grad_logits_CV @ weight_VD) * weights_C1
            _add_product(grad_weight_VD, grad_logits_CV, (hidden_CD * weights_C1).to(hidden_CD.dtype))
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(losses_T)
        return torch.dot(losses_T, weights_T), losses_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        grad_weight_VD = (grad_weight_VD * grads[0]).to(ctx.weight_dtype)
        return (grad_hidden_TD * grads[0]).to(grad_hidden_TD.dtype), grad_weight_VD, None, None, None


def _log_probs(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    return torch.log_softmax(hidden_CD @ weight_VD.t(), dim=-1, dtype=_softmax_dtype(hidden_CD))


def _softmax_dtype(hidden_TD: Tensor) -> torch.dtype:
    """float32, or float64 for a model in float64."""
    return torch.promote_types(hidden_TD.dtype, torch.float32)


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
