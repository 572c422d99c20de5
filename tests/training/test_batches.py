from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_loaders.loader import Loader
from raydist.config.registries import OBJECTIVES
from raydist.core.terms import CrossEntropyTerm
from raydist.models.mask_spec import CausalMask
from raydist.training.batches import Microbatch, StepBatch, step_batch_maker
from raydist.training.data import open_data
from tests.training.cases import recipe_of


def test_everything_moves_also_inside_dictionaries() -> None:
    tokens_BL = torch.zeros(2, 3, dtype=torch.int64)
    term = CrossEntropyTerm(name="x", positions_T=torch.arange(2), targets_T=torch.arange(2))
    inputs = {
        "tokens_BL": tokens_BL,
        "mask": CausalMask(length=3, documents_BL=tokens_BL),
        "features": {"offset": tokens_BL},
        "factor": 2,
    }
    moved = Microbatch(inputs=inputs, terms=[term]).to(torch.device("meta"))
    assert moved.inputs["tokens_BL"].is_meta
    assert moved.inputs["mask"].documents_BL.is_meta
    assert moved.inputs["features"]["offset"].is_meta
    assert moved.inputs["factor"] == 2
    assert moved.terms[0].positions_T.is_meta
    assert inputs["features"] == {"offset": tokens_BL}


def rows_of(part: Microbatch) -> Iterator[dict[str, Any]]:
    """What the model is shown and asked, row by row, without a trace of which rows are side by side."""
    tokens_BL = part.inputs["tokens_BL"]
    num_rows, length = tokens_BL.shape
    inputs = {**part.inputs, **part.inputs.get("features", {}), "allowed": part.inputs["mask"].dense()}
    shown = {name: value.expand(num_rows, *value.shape[1:]) for name, value in inputs.items() if torch.is_tensor(value)}
    for row in range(num_rows):
        found = {name: value[row].tolist() for name, value in shown.items()}
        for term in part.terms:
            mine_T = term.positions_T // length == row
            asked = {key: value[mine_T] for key, value in vars(term).items() if torch.is_tensor(value) and value.ndim}
            asked["positions_T"] = asked["positions_T"] % length
            found[term.name] = {key: value.tolist() for key, value in asked.items()}
        yield found


OBJECTIVES_AND_ROWS = [
    ({"name": "next_token"}, None),
    ({"name": "set_block"}, None),
    ({"name": "masked", "random_length": 0.5}, None),
    ({"name": "block"}, None),
    ({"name": "resample"}, None),
    ({"name": "discrete_flow"}, None),
    ({"name": "discrete_flow", "path": {"name": "mixture", "source": {"name": "uniform"}}}, None),
    ({"name": "edit_flow", "noise_length": 4}, 1),  # packs the rows of a microbatch
]


@pytest.mark.parametrize(("objective", "microbatch_rows"), OBJECTIVES_AND_ROWS, ids=lambda value: str(value))
def test_same_noise_per_step_at_every_world_size(
    objective: dict[str, Any], microbatch_rows: int | None, uneven_dataset: str, tmp_path: Path
) -> None:
    """The union over ranks is what one worker computes, row by row: noised tokens, masks, targets and weights."""
    config = recipe_of(uneven_dataset, tmp_path).config
    data = open_data(config.data, seed=config.seed)
    built = OBJECTIVES.parse(objective).build(data.ids)
    batch_rows, first_step = 24, 3

    def batches(*, rank: int, world_size: int) -> list[StepBatch]:
        make = step_batch_maker(built, noise_seed=5, microbatch_rows=microbatch_rows or batch_rows // world_size)
        loader: Loader[StepBatch] = Loader(
            data.train, batch_rows=batch_rows, rank=rank, world_size=world_size, transform=make,
            start_step=first_step, start_sample=first_step * batch_rows, num_steps=2,
        )  # fmt: skip
        return list(loader)

    alone = batches(rank=0, world_size=1)
    expected = [[row for part in batch.microbatches for row in rows_of(part)] for batch in alone]
    assert expected[0] != expected[1]
    for world_size in (2, 3, 4, 8):
        ranks = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, together in enumerate(zip(*ranks, strict=True)):
            found = [row for batch in together for part in batch.microbatches for row in rows_of(part)]
            assert found == expected[step], f"{world_size} workers, step {step}"
            assert {batch.step for batch in together} == {first_step + step}
            counts = {name: sum(batch.counts[name] for batch in together) for name in together[0].counts}
            assert counts == pytest.approx(alone[step].counts)
