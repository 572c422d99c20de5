"""Bound and Poisson terms against their formulas on dense logits in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from raydist.core.terms import ElboTerm, HeadTerm, PoissonTerm
from raydist.models.head_costs import ElboCost
from raydist.models.heads import evaluate_terms
from raydist.models.linear_loss import MAX_LOG_RATE, linear_loss, linear_poisson

T, V, D, K = 37, 53, 16, 3


@dataclass(frozen=True)
class ConstantRates:
    """``1 / (1 - t)`` for all tokens."""

    def at(self, time_C):
        return (1 / (1 - time_C))[:, None]

    def to(self, device):
        return self


@dataclass(frozen=True)
class TokenwiseRates:
    """``scale[v] / (1 - t)``."""

    scale_V: torch.Tensor

    def at(self, time_C):
        return self.scale_V / (1 - time_C)[:, None]

    def to(self, device):
        return TokenwiseRates(self.scale_V.to(device))


RATES = {
    "constant": ConstantRates(),
    "tokenwise": TokenwiseRates(torch.rand(V, generator=torch.Generator().manual_seed(9)) * 3),
}


def make(*, num: int = T, dtype: torch.dtype = torch.float32):
    """Hidden states, head and an ELBO problem in which a third of the tokens are already the target."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, D, generator=generator).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(V, D, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (num,), generator=generator)
    current = torch.where(torch.arange(num) % 3 == 0, targets, torch.randint(0, V, (num,), generator=generator))
    times = torch.rand(num, generator=generator) * 0.9
    weights = torch.rand(num, generator=generator) * 2
    return hidden, weight, weights, {"targets_T": targets, "current_T": current, "times_T": times}


def dense_elbo(logits, *, targets_T, current_T, times_T, rates):
    """The formula of the contract, position by position."""
    log_probs = torch.log_softmax(logits, -1)
    probs, costs = log_probs.exp(), []
    rates_TV = rates.at(times_T).double().expand(-1, logits.shape[1])
    for t in range(logits.shape[0]):
        x, y = current_T[t], targets_T[t]
        cost = (rates_TV[t] * probs[t]).sum() - rates_TV[t, x] * probs[t, x]
        if x != y:
            cost = cost - rates_TV[t, y] * (1 + log_probs[t, y])
        costs.append(cost)
    return torch.stack(costs) if costs else logits.sum(-1)


def reference(hidden, weight, weights, formula, *, upstream: float):
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    costs = formula(h @ w.t())
    loss = (costs * weights.double()).sum()
    (loss * upstream).backward()
    return loss.detach(), costs.detach(), h.grad, w.grad


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("chunk", [1, 5, 36, 1000, None])
@pytest.mark.parametrize("weighted", [False, True])
def test_bound_and_its_gradients_equal_the_formula(rates, chunk, weighted):
    hidden, weight, weights, known = make()
    if not weighted:
        weights = torch.ones(T)
    loss, losses = linear_loss(
        hidden,
        weight_VD=weight,
        cost=ElboCost(**known, rates=rates),
        weights_T=weights if weighted else None,
        chunk_positions=chunk,
    )
    (loss * -0.7).backward()
    expected = reference(hidden, weight, weights, lambda z: dense_elbo(z, **known, rates=rates), upstream=-0.7)
    assert not losses.requires_grad
    for found, wanted in zip((loss, losses, hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        again, again_losses = linear_loss(
            hidden, weight_VD=weight, cost=ElboCost(**known, rates=rates), weights_T=weights, chunk_positions=chunk
        )
    torch.testing.assert_close(again, loss.detach())
    torch.testing.assert_close(again_losses, losses)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_gradcheck_of_the_bound(rates):
    hidden, weight, weights, known = make(num=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_loss(
            h, weight_VD=w, cost=ElboCost(**known, rates=rates), weights_T=weights, chunk_positions=3
        )[0],
        (hidden, weight),
    )


def test_equal_rates_in_either_shape_give_the_same():
    hidden, weight, weights, known = make()
    wide = TokenwiseRates(torch.ones(V))
    found = []
    for rates in (ConstantRates(), wide):
        loss, losses = linear_loss(hidden, weight_VD=weight, cost=ElboCost(**known, rates=rates), weights_T=weights)
        found.append((losses, *torch.autograd.grad(loss, (hidden, weight))))
    for narrow, broad in zip(*found, strict=True):
        torch.testing.assert_close(narrow, broad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_the_bound_is_least_where_the_truth_is_certain(rates):
    """At P = onehot(y) an arrived token costs 0, and one on its way costs ``lambda(y) - lambda(y) = 0``."""
    known = {
        "targets_T": torch.tensor([2, 2]),
        "current_T": torch.tensor([2, 5]),
        "times_T": torch.tensor([0.5, 0.5]),
    }
    hidden = torch.tensor([[60.0]] * 2, requires_grad=True)
    weight = torch.zeros(V, 1).index_fill(0, torch.tensor(2), 1.0)
    loss, losses = linear_loss(hidden, weight_VD=weight, cost=ElboCost(**known, rates=rates))
    loss.backward()
    torch.testing.assert_close(losses, torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden.grad, torch.zeros(2, 1), rtol=0, atol=1e-6)


def test_bound_in_bf16_stays_within_the_rounding_of_its_operands():
    hidden, weight, weights, known = make(dtype=torch.bfloat16)
    rates = RATES["tokenwise"]
    loss, losses = linear_loss(
        hidden, weight_VD=weight, cost=ElboCost(**known, rates=rates), weights_T=weights, chunk_positions=10
    )
    loss.backward()
    expected, _, grad_hidden, grad_weight = reference(
        hidden, weight, weights, lambda z: dense_elbo(z, **known, rates=rates), upstream=1.0
    )
    assert loss.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    for found, wanted in ((hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 2e-2


def poisson_problem(*, num: int = T, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(num, D, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(K, D, generator=generator)).to(dtype).requires_grad_()
    exposure = torch.randint(0, 2, (num, K), generator=generator).float()
    counts = torch.rand(num, K, generator=generator) * 4
    return hidden, weight, torch.rand(num, generator=generator), exposure, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_poisson_and_its_gradients_equal_the_formula(dtype, weighted):
    hidden, weight, weights, exposure, counts = poisson_problem(dtype=dtype)
    if not weighted:
        weights = torch.ones(T)
    loss, losses = linear_poisson(
        hidden,
        weight_KD=weight,
        exposure_TK=exposure,
        counts_TK=counts,
        weights_T=weights if weighted else None,
    )
    (loss * -0.7).backward()
    expected = reference(hidden, weight, weights, lambda o: (exposure * o.exp() - counts * o).sum(-1), upstream=-0.7)
    assert loss.dtype == losses.dtype == torch.float32
    assert not losses.requires_grad
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.double(), expected[1], rtol=1e-5, atol=1e-5)
    for found, wanted in zip((hidden.grad, weight.grad), expected[2:], strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_poisson_is_least_at_the_rate_of_the_counts():
    target = torch.tensor([[0.5, 3.0, 20.0]])
    log_rates = target.log().requires_grad_()
    loss, _ = linear_poisson(
        log_rates, weight_KD=torch.eye(3), exposure_TK=torch.full((1, 3), 2.0), counts_TK=2.0 * target
    )
    loss.backward()
    torch.testing.assert_close(log_rates.grad, torch.zeros(1, 3), rtol=0, atol=1e-5)


def test_poisson_of_an_outlier_is_finite_and_pulls_back():
    log_rates = torch.tensor([[MAX_LOG_RATE + 100.0], [MAX_LOG_RATE - 1.0]], requires_grad=True)
    loss, losses = linear_poisson(
        log_rates, weight_KD=torch.ones(1, 1), exposure_TK=torch.ones(2, 1), counts_TK=torch.zeros(2, 1)
    )
    loss.backward()
    assert losses.tolist() == pytest.approx([101.0 * math.exp(MAX_LOG_RATE), math.exp(MAX_LOG_RATE - 1)], rel=1e-5)
    gradient = log_rates.grad.flatten().tolist()
    assert gradient == pytest.approx([math.exp(MAX_LOG_RATE), math.exp(MAX_LOG_RATE - 1)], rel=1e-5)


def elbo_term(num: int) -> ElboTerm:
    _, _, weights, known = make(num=num)
    return ElboTerm(name="x", positions_T=torch.arange(num), weights_T=weights, rates=RATES["tokenwise"], **known)


def poisson_term(num: int) -> PoissonTerm:
    _, _, weights, exposure, counts = poisson_problem(num=num)
    return PoissonTerm(
        name="x",
        positions_T=torch.arange(num),
        weights_T=weights,
        exposure_TK=exposure,
        counts_TK=counts,
        head="rates",
    )


@pytest.mark.parametrize("make_term", [elbo_term, poisson_term])
def test_no_positions_give_zero_and_zero_gradients(make_term):
    term: HeadTerm = make_term(0)
    hidden = torch.randn(2, 4, D, requires_grad=True)
    heads = {"lm": torch.randn(V, D, requires_grad=True), "rates": torch.randn(K, D, requires_grad=True)}
    (result,) = evaluate_terms(hidden, terms=[term], heads=heads)
    result.loss_sum.backward()
    assert result.loss_sum.item() == 0.0
    assert result.losses_T.shape == (0,)
    assert not hidden.grad.any()
    assert not heads[term.head].grad.any()


def test_terms_read_their_own_positions_and_heads():
    hidden, weight, _, known = make(num=8)
    picked = torch.tensor([6, 1, 3])
    heads = {"lm": weight.detach() + 1, "other": weight}
    term = ElboTerm(
        name="x",
        positions_T=picked,
        rates=RATES["constant"],
        head="other",
        **{name: value[picked] for name, value in known.items()},
    ).to(torch.device("cpu"))
    (result,) = evaluate_terms(hidden.view(2, 4, D), terms=[term], heads=heads)
    expected = dense_elbo((hidden @ weight.t()).double(), **known, rates=RATES["constant"])[picked]
    assert result.term is term
    torch.testing.assert_close(result.losses_T.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_term_without_an_evaluation_is_refused():
    with pytest.raises(TypeError, match="no evaluation for a HeadTerm"):
        evaluate_terms(
            torch.zeros(1, 1, D),
            terms=[HeadTerm(name="x", positions_T=torch.tensor([0]))],
            heads={"lm": torch.zeros(V, D)},
        )
