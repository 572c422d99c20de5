from __future__ import annotations

import torch
from torch.nn import functional as F

from raydist.models.norm import RMSNorm


def norm_of(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, width))
    return norm


def test_value_and_gradients_equal_torchs():
    generator = torch.Generator().manual_seed(0)
    norm = norm_of(24, torch.float64)
    x = torch.randn(3, 5, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 24, generator=generator, dtype=torch.float64)
    ours, theirs = norm(x), F.rms_norm(x, (24,), norm.weight, eps=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(theirs, (x, norm.weight), grad)
    for actual, reference in zip(torch.autograd.grad(ours, (x, norm.weight), grad), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-11, atol=1e-12)


def test_heads_whose_memory_is_transposed():
    generator = torch.Generator().manual_seed(0)
    norm = norm_of(8, torch.float64)
    x = torch.randn(2, 3, 4, 8, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))


def test_bf16_is_normalised_in_float32():
    generator = torch.Generator().manual_seed(0)
    norm = norm_of(512, torch.bfloat16)
    x = (100 * torch.randn(7, 512, generator=generator)).bfloat16().requires_grad_()
    wide = x.detach().float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), (wide * scale).bfloat16() * norm.weight)
    norm(x).float().sum().backward()
    reference = wide.clone().requires_grad_()
    F.rms_norm(reference, (512,), norm.weight.float(), eps=1e-5).sum().backward()
    torch.testing.assert_close(x.grad.float(), reference.grad, rtol=0.02, atol=1e-4)
    assert x.grad.dtype == norm.weight.grad.dtype == torch.bfloat16
