"""Oracles: torch's plain AdamW, and bit-for-bit equality of everything that must not have been written."""

from __future__ import annotations

import copy

import torch
from torch import nn

from raydist.config.schema import OptimizerConfig
from raydist.training.optim import GuardedAdamW
from raydist.training.step import NonFiniteGuard

CONFIG = OptimizerConfig(learning_rate=0.01, betas=(0.9, 0.95), weight_decay=0.1)


def a_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_equals_adamw_with_decay_on_matrices_only() -> None:
    ours, theirs = a_model(), a_model()
    optimizer = GuardedAdamW(ours.named_parameters(), CONFIG)
    groups = [
        {"params": [theirs[0].weight], "weight_decay": 0.1},
        {"params": [theirs[0].bias, *theirs[1].parameters()], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False, fused=False)
    for step in range(4):
        optimizer.set_learning_rate(0.01 * (step + 1))
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.guarded_step(torch.tensor(0.0))
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_set_flag_leaves_weights_moments_and_step_count_alone() -> None:
    model = a_model()
    optimizer = GuardedAdamW(model.named_parameters(), CONFIG)
    give_gradients(model, 1)
    optimizer.guarded_step(torch.tensor(0.0))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    give_gradients(model, 2)
    next(model.parameters()).grad.fill_(float("nan"))
    optimizer.guarded_step(torch.tensor(1.0))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][index][key]) for key, value in state.items())


def test_the_guard_remembers_the_first_bad_step_and_stays_set() -> None:
    guard = NonFiniteGuard.create(torch.device("cpu"))
    norms = [1.0, float("inf"), 1.0, float("nan")]
    flags = [float(guard.observe(torch.tensor(norm), step)) for step, norm in enumerate(norms)]
    assert flags == [0.0, 1.0, 1.0, 1.0]
    assert int(guard.first_bad_step) == 1
