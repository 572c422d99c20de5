"""A NaN on one of two workers stops both at the same step, and reaches the weights of neither."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raydist.checkpoint.checkpointer import Checkpointer
from raydist.core.dist import Workers
from raydist.core.errors import NonFiniteError
from raydist.training.batches import Microbatch, StepBatch
from raydist.training.loop import TrainLoop
from raydist.training.setup import assemble, train_loader
from tests.fsdp_utils.workers import run_workers
from tests.training.cases import recipe_of

BAD_STEP, LOGGED_STEP = 3, 5
CASES = ("loss", "gradient")


def shards(module: nn.Module) -> dict[str, Tensor]:
    """A copy of this worker's part of each weight."""
    return {name: weight.to_local().detach().clone() for name, weight in module.named_parameters()}  # type: ignore[operator]


def with_nan(batch: StepBatch) -> StepBatch:
    """The same, but the first term of its first microbatch is NaN."""
    first, *others = batch.microbatches
    weights_T = torch.full(first.terms[0].positions_T.shape, float("nan"))
    terms = [dataclasses.replace(first.terms[0], weights_T=weights_T), *first.terms[1:]]
    return dataclasses.replace(batch, microbatches=[Microbatch(inputs=first.inputs, terms=terms), *others])


def train(workers: Workers, dataset: str, folder: str, case: str) -> None:
    """Worker 1 meets a NaN in its part of the loss, or only in its shard of a gradient."""
    changes = {"training.log_every_steps": LOGGED_STEP, "training.validate_every_steps": "null"}
    recipe = recipe_of(dataset, Path(folder), **changes)
    parts = assemble(recipe.config, workers)
    loader = train_loader(recipe.config, parts, workers, start_step=0, start_sample=0)
    running: list[int] = []
    before: list[dict[str, Tensor]] = []

    def batches() -> Iterator[StepBatch]:
        for batch in loader:
            assert batch.step < LOGGED_STEP, "this worker goes on alone"
            running[:] = [batch.step]
            before.append(shards(parts.model))
            is_bad = case == "loss" and workers.rank == 1 and batch.step == BAD_STEP
            yield with_nan(batch) if is_bad else batch

    def poison(weight: Any) -> None:
        if running == [BAD_STEP] and workers.rank == 1:
            weight.grad.to_local().fill_(float("nan"))

    if case == "gradient":
        parts.model.get_parameter("head.weight").register_post_accumulate_grad_hook(poison)
    with Checkpointer(f"{folder}/run", keep=1, workers=workers) as checkpointer:
        loop = TrainLoop(recipe.config, parts, workers=workers, checkpointer=checkpointer, tracker=None, hooks=())
        with pytest.raises(NonFiniteError) as caught:
            loop.run(batches(), start_step=0)
    loader.close()
    after = shards(parts.model)
    assert running == [LOGGED_STEP - 1], "noticed where the loss is read, and not earlier"
    assert any(weight.numel() for weight in after.values())
    assert not all(torch.equal(before[BAD_STEP][name], before[BAD_STEP - 1][name]) for name in after)
    assert all(torch.equal(after[name], before[BAD_STEP][name]) for name in after)
    Path(f"{folder}/rank-{workers.rank}.json").write_text(json.dumps([caught.value.where, caught.value.what]))


def train_all_cases(workers: Workers, dataset: str, folder: str) -> None:
    for case in CASES:
        train(workers, dataset, f"{folder}/{case}", case)


def test_a_nan_on_one_of_two_workers_stops_both_before_the_same_step(dataset: str, tmp_path: Path) -> None:
    for case in CASES:
        (tmp_path / case).mkdir()
    run_workers(train_all_cases, dataset, str(tmp_path), world_size=2, store_path=f"{tmp_path}/store")
    for case in CASES:
        told = [json.loads((tmp_path / case / f"rank-{rank}.json").read_text()) for rank in range(2)]
        assert told[0] == told[1]
        assert told[0][0] == f"optimizer step {BAD_STEP}"
