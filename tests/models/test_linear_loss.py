from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from raydist.models.head_costs import CrossEntropyCost
from raydist.models.linear_loss import linear_loss

T, V, D = 37, 53, 16


def linear_cross_entropy(hidden, *, targets_T, **options):
    return linear_loss(hidden, cost=CrossEntropyCost(targets_T=targets_T), **options)


def make(*, dtype: torch.dtype = torch.float32, num: int = T):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (num,), generator=generator)
    weights = torch.rand(num, generator=generator) * 3
    return hidden, weight, targets, weights


def reference(hidden, weight, targets, weights, *, upstream: float = 1.0):
    """Plain cross entropy in double: loss, per-position losses, gradients."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    losses = F.cross_entropy(h @ w.t(), targets, reduction="none")
    loss = (losses * weights.double()).sum()
    (loss * upstream).backward()
    return loss.detach(), losses.detach(), h.grad, w.grad


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000, None])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradients_equal_plain_cross_entropy(chunk, weighted):
    hidden, weight, targets, weights = make()
    if not weighted:
        weights = torch.ones(T)
    loss, losses = linear_cross_entropy(
        hidden,
        weight_VD=weight,
        targets_T=targets,
        weights_T=weights if weighted else None,
        chunk_positions=chunk,
    )
    (loss * -0.7).backward()
    expected_loss, expected_losses, grad_hidden, grad_weight = reference(
        hidden, weight, targets, weights, upstream=-0.7
    )
    assert loss.dtype == losses.dtype == torch.float32
    assert not losses.requires_grad
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), grad_weight, rtol=1e-5, atol=1e-6)


def test_gradcheck_in_double():
    hidden, weight, targets, weights = make(dtype=torch.float64, num=7)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, weight_VD=w, targets_T=targets, weights_T=weights, chunk_positions=3)[0],
        (hidden, weight),
    )


def test_no_positions_give_zero_and_zero_gradients():
    hidden, weight, targets, weights = make(num=0)
    loss, losses = linear_cross_entropy(hidden, weight_VD=weight, targets_T=targets, weights_T=weights)
    loss.backward()
    assert loss.item() == 0.0
    assert losses.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(V, D))
    assert hidden.grad.shape == (0, D)


def test_bf16_stays_within_the_rounding_of_its_operands():
    hidden, weight, targets, weights = make(dtype=torch.bfloat16)
    loss, losses = linear_cross_entropy(
        hidden, weight_VD=weight, targets_T=targets, weights_T=weights, chunk_positions=10
    )
    loss.backward()
    expected_loss, _, grad_hidden, grad_weight = reference(hidden, weight, targets, weights)
    assert loss.dtype == losses.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-2, atol=0)
    for found, expected in ((hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        assert float((found.double() - expected).norm() / expected.norm()) < 1.5e-2


def test_bf16_weight_gradient_is_accumulated_in_float32():
    # 4096 equal contributions of one: a bf16 running sum would stop growing at 256
    num = 4096
    hidden = torch.ones(num, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(num, dtype=torch.int64)
    linear_cross_entropy(hidden, weight_VD=weight, targets_T=targets, chunk_positions=2)[0].backward()
    assert weight.grad[:, 0].tolist() == [-num / 2, num / 2]


class _Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation returned, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.num_products += "mm" in func.__name__
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_logits_of_all_positions_never_exist():
    num, chunk, vocabulary, width = 512, 16, 1024, 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (num,), generator=generator)
    with _Watch() as watch:
        linear_cross_entropy(hidden, weight_VD=weight, targets_T=targets, chunk_positions=chunk)[0].backward()
    assert watch.numel == chunk * vocabulary
    with _Watch() as watch:
        F.cross_entropy(hidden @ weight.t(), targets).backward()
    assert watch.numel == num * vocabulary


def test_without_gradient_no_gradient_work_is_done():
    hidden, weight, targets, weights = make()
    expected_loss, expected_losses, *_ = reference(hidden, weight, targets, weights)
    with torch.no_grad(), _Watch() as watch:
        loss, losses = linear_cross_entropy(
            hidden, weight_VD=weight, targets_T=targets, weights_T=weights, chunk_positions=4
        )
    assert watch.num_products == -(-T // 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-6)


def test_certain_predictions_do_not_overflow():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss, losses = linear_cross_entropy(hidden, weight_VD=weight, targets_T=torch.tensor([0, 0]))
    loss.backward()
    assert losses.tolist() == [0.0, 2e4]
    assert hidden.grad.tolist() == [[0.0], [-2.0]]
