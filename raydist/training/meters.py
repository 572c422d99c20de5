"""Metrics that are summed on the device and read once per log line."""

from __future__ import annotations

import torch
from torch import Tensor

from raydist.core.dist import max_over_ranks, sum_over_ranks
from raydist.objectives.base import Mean


class Meters:
    """Accumulates between two log lines. Adding never waits for the device; :meth:`read` does, once.

    Three reductions, named by the method that adds: ``add_mean`` is a ratio of sums over steps, microbatches and ranks;
    ``add_share`` is a quantity of which every rank and microbatch holds a part, averaged over steps; ``add_max`` is the
    maximum over steps and ranks.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._means: dict[str, tuple[Tensor, Tensor]] = {}
        self._shares: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._num_steps = 0

    def add_mean(self, name: str, mean: Mean) -> None:
        """A ratio of sums, e.g. a cost per token."""
        old = self._means.get(name)
        total, count = mean.total.detach(), mean.count.detach()
        self._means[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def add_share(self, name: str, value: Tensor) -> None:
        """This rank's and microbatch's part of a quantity of the step."""
        value = value.detach()
        self._shares[name] = self._shares[name] + value if name in self._shares else value

    def add_max(self, name: str, value: Tensor) -> None:
        """A quantity whose largest value matters."""
        value = value.detach()
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def end_step(self) -> None:
        """Counts one optimizer step."""
        self._num_steps += 1

    def read(self) -> dict[str, float]:
        """Reduces over ranks, returns plain numbers and starts anew. A collective: every rank calls it."""
        num_steps = max(1, self._num_steps)
        means, shares, maxima = sorted(self._means), sorted(self._shares), sorted(self._maxima)
        parts = [part for name in means for part in self._means[name]] + [self._shares[name] for name in shares]
        values: dict[str, float] = {}
        if parts:
            sums = sum_over_ranks(torch.stack([part.double() for part in parts])).tolist()
            for index, name in enumerate(means):
                total, count = sums[2 * index], sums[2 * index + 1]
                if count > 0:
                    values[name] = total / count
            for name, total in zip(shares, sums[2 * len(means) :], strict=True):
                values[name] = total / num_steps
        if maxima:
            tops = max_over_ranks(torch.stack([self._maxima[name].double() for name in maxima])).tolist()
            values.update(zip(maxima, tops, strict=True))
        self._reset()
        return values
