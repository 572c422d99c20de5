"""A save on a GPU: its copy runs in a stream of its own, beside kernels that are queued before and after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raydist.checkpoint.checkpointer import Checkpointer
from raydist.core.dist import Workers
from tests.checkpoint.cases import assert_equal, checkpointer_of_one, whole_state

pytestmark = pytest.mark.gpu

WIDTH, NUM_STEPS = 4096, 6


def make(device: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    model(torch.ones(WIDTH, WIDTH, device=device)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_each_save_holds_the_values_at_its_step_though_the_gpu_is_behind_and_training_goes_on(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    workers = Workers(0, 0, 1, device)
    model, optimizer = make(device)
    states = {}
    with Checkpointer(str(tmp_path), keep=NUM_STEPS, workers=workers) as checkpointer:
        for number in range(1, NUM_STEPS + 1):
            step(model, optimizer, device)  # the host is far ahead of these kernels
            checkpointer.save(number, model=model, optimizer=optimizer, trainer_state={})
            states[number] = whole_state(model, optimizer)  # clones on the GPU: the host does not wait
    for number, state in states.items():
        fresh_model, fresh_optimizer = make(torch.device("cpu"))
        for path in (tmp_path / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > number:
                path.rename(tmp_path / path.name)
        with checkpointer_of_one(str(tmp_path)) as reader:
            trainer_state = reader.load_newest(fresh_model, optimizer=fresh_optimizer)
        assert trainer_state is not None
        assert trainer_state["step"] == number
        assert_equal(whole_state(fresh_model, fresh_optimizer), {name: value.cpu() for name, value in state.items()})
        for path in tmp_path.glob("step-*"):
            path.rename(tmp_path / "checkpoints" / path.name)
