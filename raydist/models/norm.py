"""Root-mean-square normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``: normalised in float32, cast back, and only then multiplied."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        normed: Tensor = _RMSNormFunction.apply(x, self.weight, self.eps)
        return normed


class _RMSNormFunction(torch.autograd.Function):
    """The gradient in closed form, in half the passes over memory that the gradients of the operators take.

    With ``s = 1 / sqrt(mean(x^2) + eps)`` and the gradient g of ``y = x s w``: ``dw = sum(g x s)`` over positions and
    ``dx = s g w - x s^3 mean(g w x)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide_dtype(x))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (wide * scale).to(x.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        wide, wide_grad, wide_weight_D = (tensor.to(scale.dtype) for tensor in (x, grad, weight_D))
        product = wide_grad * wide
        grad_weight_D = product.flatten(0, -2).t() @ scale.flatten()
        mean = (product @ wide_weight_D)[..., None] / x.shape[-1]
        grad_x = (wide_grad * wide_weight_D).mul_(scale).addcmul_(wide, scale.pow(3).mul_(mean), value=-1)
        return grad_x.to(x.dtype), grad_weight_D.to(weight_D.dtype), None


def _wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for a model in float64."""
    return torch.promote_types(x.dtype, torch.float32)
