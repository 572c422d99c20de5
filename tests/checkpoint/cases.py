"""A small model with every kind of parameter, its optimizer, and steps that change both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from raydist.checkpoint.checkpointer import Checkpointer
from raydist.checkpoint.state import model_tensors, optimizer_tensors
from raydist.core.dist import Workers
from raydist.fsdp_utils.mesh import make_mesh


class Small(nn.Module):
    """Rows that 2 workers do not divide, one row that leaves a worker none, a tied weight and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embedding = nn.Parameter(torch.randn(7, 4, generator=generator))
        self.inner = nn.Linear(4, 4, bias=True)
        self.inner.weight = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.inner.bias = nn.Parameter(torch.randn(4, generator=generator))
        self.row = nn.Parameter(torch.randn(1, 4, generator=generator))
        self.head = self.embedding
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, ids_T: Tensor) -> Tensor:
        return (self.inner(self.embedding[ids_T]) * self.row) @ self.head.T


def make(workers: Workers | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model, sharded if workers are given, and an AdamW without state."""
    model = Small()
    if workers is not None:
        mesh = make_mesh(workers)
        fully_shard(model.inner, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, *, num_steps: int = 1) -> None:
    """Optimizer steps on fixed data, the same on every worker."""
    for _ in range(num_steps):
        optimizer.zero_grad()
        (model(torch.arange(7)).logsumexp(dim=-1).sum() / 7).backward()
        optimizer.step()
        with torch.no_grad():
            model.seen += 1


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a checkpoint holds, unsharded, copied."""
    tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def save_as(workers: Workers, run_dir: str, state_path: str) -> None:
    """Three steps, a validation forward that leaves parameters gathered, a save, and a step that must not leak in."""
    model, optimizer = make(workers)
    advance(model, optimizer, num_steps=3)
    with torch.no_grad():
        model(torch.arange(7))
    state = whole_state(model, optimizer)
    with Checkpointer(run_dir, keep=2, workers=workers) as checkpointer:
        checkpointer.save(3, model=model, optimizer=optimizer, trainer_state={"samples_consumed": 24})
        advance(model, optimizer)
    if workers.is_first:
        save_file(state, state_path)


def check_loads_as(workers: Workers, run_dir: str, state_path: str) -> None:
    """Loads into a fresh model on this number of workers and compares; then both go on and still agree."""
    model, optimizer = make(workers)
    with Checkpointer(run_dir, keep=2, workers=workers) as checkpointer:
        trainer_state = checkpointer.load_newest(model, optimizer=optimizer)
    assert trainer_state is not None
    assert (trainer_state["step"], trainer_state["samples_consumed"]) == (3, 24)
    assert_equal(whole_state(model, optimizer), load_file(state_path))
    again, again_optimizer = make(workers)
    advance(again, again_optimizer, num_steps=4)
    advance(model, optimizer)
    if trainer_state["world_size"] == workers.world_size:
        assert_equal(whole_state(model, optimizer), whole_state(again, again_optimizer))


@contextmanager
def checkpointer_of_one(run_dir: str, **options: object) -> Iterator[Checkpointer]:
    """A checkpointer without a process group; closed quietly."""
    workers = Workers(0, 0, 1, torch.device("cpu"))
    checkpointer = Checkpointer(run_dir, workers=workers, **{"keep": 2, **options})  # type: ignore[arg-type]
    yield checkpointer
    checkpointer.close()
