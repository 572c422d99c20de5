"""From rows to what the step eats, in the loader's thread.

Noise, targets and counts are made on CPU while the device computes the step before, so the step itself has neither
data-dependent shapes to discover nor numbers to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.terms import HeadTerm
from raydist.objectives.base import Objective


@dataclass(frozen=True)
class Microbatch:
    """One forward's worth: model inputs and what the heads are asked."""

    inputs: dict[str, Any]
    terms: list[HeadTerm]

    def to(self, device: torch.device) -> Microbatch:
        """The microbatch on a device; everything that has a ``to`` is moved, also inside dictionaries."""
        moved = {name: _moved(value, device) for name, value in self.inputs.items()}
        return Microbatch(inputs=moved, terms=[term.to(device) for term in self.terms])


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one optimizer step.

    Attributes:
        step: the optimizer step.
        microbatches: in the order of accumulation.
        counts: denominator name -> this rank's count, summed over its microbatches.
    """

    step: int
    microbatches: list[Microbatch]
    counts: dict[str, float]


def step_batch_maker(objective: Objective, *, noise_seed: int, microbatch_rows: int) -> Callable[[Rows], StepBatch]:
    """The loader's transform: rows of one rank and step -> :class:`StepBatch`."""

    def make(rows: Rows) -> StepBatch:
        microbatches = []
        counts: dict[str, float] = {}
        rng = RowRng(noise_seed, rows.step, rows.epochs_B, rows.rows_B, rows.samples_B)
        for start in range(0, len(rows), microbatch_rows):
            stop = start + microbatch_rows
            noised = objective.corrupt(rows.narrow(start, stop), rng.narrow(start, stop))
            microbatches.append(Microbatch(inputs=noised.inputs, terms=objective.terms(noised)))
            for name, count in noised.counts.items():
                counts[name] = counts.get(name, 0.0) + count
        return StepBatch(step=rows.step, microbatches=microbatches, counts=counts)

    return make


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _moved(inner, device) for name, inner in value.items()}
    return value.to(device) if hasattr(value, "to") else value
