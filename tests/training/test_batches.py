from __future__ import annotations

import torch

from raydist.core.terms import CrossEntropyTerm
from raydist.models.mask_spec import CausalMask
from raydist.training.batches import Microbatch


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
