"""One optimizer step: the global denominator first, then forward and backward per microbatch, then a guarded update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raydist.core.dist import sum_over_ranks
from raydist.objectives.base import LossTerms, Mean, Objective
from raydist.training.batches import StepBatch
from raydist.training.meters import Meters
from raydist.training.optim import GuardedAdamW
from raydist.training.preemption import Ballot


@dataclass
class NonFiniteGuard:
    """Remembers, on the device, the first step whose gradient norm was not finite.

    The norm is global, so the flag is the same on every rank without a vote, and a NaN on one rank stops all. Once set it
    stays set: no later step writes either, so the weights are those of the step before until someone looks.
    """

    first_bad_step: Tensor
    """int64 scalar; -1 while all is well."""

    @classmethod
    def create(cls, device: torch.device) -> NonFiniteGuard:
        """A guard that has seen nothing."""
        return cls(torch.full((), -1, dtype=torch.int64, device=device))

    def observe(self, grad_norm: Tensor, step: int) -> Tensor:
        """Takes in a step's norm; returns 1 where nothing may be written any more, else 0."""
        newly_bad = ~torch.isfinite(grad_norm) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(newly_bad, step, self.first_bad_step)
        return (self.first_bad_step >= 0).to(torch.float32)


def global_counts(
    counts: dict[str, float], device: torch.device, *, wishes: Sequence[float] = ()
) -> tuple[dict[str, Tensor], Ballot]:
    """Denominators summed over ranks, at least 1 each so that a step without targets costs nothing instead of NaN.

    Args:
        counts: denominator name -> this rank's count.
        device: of the sum.
        wishes: numbers that are summed along.
    """
    names = sorted(counts)
    values = [*(counts[name] for name in names), *wishes]
    # from pinned memory the copy to a GPU does not wait
    local = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    sums = sum_over_ranks(local.to(device, non_blocking=True))
    ballot = Ballot(sums[len(names) :])
    total = sums[: len(names)].clamp(min=1.0)
    return {name: total[index] for index, name in enumerate(names)}, ballot


def share_of_loss(loss_terms: LossTerms, denominators: dict[str, Tensor]) -> Tensor:
    """This microbatch's part of the step's loss; the parts of all microbatches and ranks add up to it."""
    parts = [value / denominators[name].to(value.dtype) for name, value in sorted(loss_terms.sums.items())]
    return torch.stack(parts).sum()


def add_to_meters(meters: Meters, loss: Tensor, metrics: dict[str, Mean]) -> None:
    """Puts one microbatch's loss share and metrics into the meters."""
    meters.add_share("loss", loss)
    for name, mean in metrics.items():
        meters.add_mean(name, mean)


def clip_by_global_norm(model: nn.Module, max_norm: float | None) -> Tensor:
    """The global gradient norm, a plain scalar equal on all ranks; scales gradients down where it exceeds ``max_norm``.

    Each rank holds its own rows of every gradient, so the squares of the ranks' norms add up.
    """
    gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
    local_norm = nn.utils.get_total_norm(gradients, foreach=True)
    norm = sum_over_ranks(local_norm.square()).sqrt()
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def train_step(
    model: nn.Module,
    objective: Objective,
    optimizer: GuardedAdamW,
    batch: StepBatch,
    *,
    device: torch.device,
    clip_norm: float | None,
    guard: NonFiniteGuard,
    meters: Meters,
    wishes: Sequence[float] = (),
) -> Ballot:
    """Runs one step. Reads nothing back from the device.

    Returns:
        What all ranks together wish.
    """
    denominators, ballot = global_counts(batch.counts, device, wishes=wishes)
    for microbatch in batch.microbatches:
        on_device = microbatch.to(device)
        results = model(**on_device.inputs, terms=on_device.terms)
        loss_terms = objective.combine(results)
        loss = share_of_loss(loss_terms, denominators)
        loss.backward()
        add_to_meters(meters, loss, loss_terms.metrics)
    grad_norm = clip_by_global_norm(model, clip_norm)
    optimizer.guarded_step(guard.observe(grad_norm, batch.step))
    optimizer.zero_grad(set_to_none=True)
    meters.add_max("grad_norm", grad_norm)
    meters.end_step()
    return ballot


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[StepBatch],
    *,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss and metrics over all batches together, as if they were one. A collective; changes nothing.

    Args:
        model: sharded or plain.
        objective: what made the batches.
        batches: this rank's parts.
        device: to compute on.
        interrupted: asked before each batch, must answer alike on all ranks; True ends the evaluation without a result.
    """
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in batch.counts.items():
            counts[name] = counts.get(name, 0.0) + count
    denominators, _ = global_counts(counts, device)
    meters = Meters()
    for batch in batches:
        if interrupted():
            return None
        for microbatch in batch.microbatches:
            on_device = microbatch.to(device)
            loss_terms = objective.combine(model(**on_device.inputs, terms=on_device.terms))
            add_to_meters(meters, share_of_loss(loss_terms, denominators), loss_terms.metrics)
    meters.end_step()
    return meters.read()
