"""What a resume reads from a bucket, counted by the proxy that it goes through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from raydist.checkpoint import files
from raydist.checkpoint.checkpointer import Checkpointer
from raydist.checkpoint.layout import newest_complete
from raydist.checkpoint.load import load_checkpoint
from raydist.core.dist import Workers
from raydist.fsdp_utils.mesh import make_mesh
from tests.fsdp_utils.workers import run_alone, run_workers
from tests.servers.faulty_proxy import FaultyProxy

_BLOCK_BYTES = 64 << 10


def _sharded(workers: Workers) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Linear(256, 512, bias=False) for _ in range(4)))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) * 1e-4 + number)
    fully_shard(model, mesh=make_mesh(workers))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _save_and_resume(workers: Workers, run_dir: str) -> None:
    files.BLOCK_BYTES = _BLOCK_BYTES
    model, optimizer = _sharded(workers)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Checkpointer(run_dir, keep=1, workers=workers) as checkpointer:
        checkpointer.save(1, model=model, optimizer=optimizer, trainer_state={})
    model, optimizer = _sharded(workers)
    with Checkpointer(run_dir, keep=1, workers=workers) as checkpointer:
        assert checkpointer.load_newest(model, optimizer=optimizer) is not None


def _load_model_only(workers: Workers, run_dir: str) -> None:
    checkpoint = newest_complete(run_dir)
    assert checkpoint is not None
    load_checkpoint(checkpoint, _sharded(workers)[0])


def test_two_workers_together_read_a_checkpoint_once(
    bucket: str, s3_proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", _BLOCK_BYTES)
    run_dir = f"{bucket}/run"
    run_workers(_save_and_resume, run_dir, world_size=2, store_path=f"{tmp_path}/store")
    checkpoint = newest_complete(run_dir)
    assert checkpoint is not None
    total_bytes = checkpoint.total_bytes()
    assert total_bytes > 6 << 20
    resumed_bytes = s3_proxy.received_bytes(part="safetensors")
    assert 0.9 * total_bytes < resumed_bytes < 1.1 * total_bytes
    run_alone(_load_model_only, run_dir)
    assert s3_proxy.received_bytes(part="safetensors") - resumed_bytes < 0.4 * total_bytes
