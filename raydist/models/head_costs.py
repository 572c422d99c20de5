"""Costs of positions given their logits, each with its gradient in closed form.

A cost sees one chunk of positions at a time (see :mod:`raydist.models.linear_loss`), so that logits and gradient exist
for that chunk only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydist.core.terms import TokenRates


class LogitCost(ABC):
    """A cost of each position, a function of its logits; holds what is known about all T positions."""

    @abstractmethod
    def values(self, logits_CV: Tensor, chunk: slice) -> Tensor:
        """The costs ``[C]`` of a chunk of positions, in the softmax's dtype."""

    @abstractmethod
    def values_and_gradient(self, logits_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """The costs ``[C]`` and their gradients with respect to the logits ``[C, V]``, in the softmax's dtype."""


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for a model in float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class CrossEntropyCost(LogitCost):
    """``-log softmax(logits)[target]``; its gradient is ``softmax(logits) - onehot(target)``."""

    targets_T: Tensor

    @override
    def values(self, logits_CV: Tensor, chunk: slice) -> Tensor:
        log_probs_CV = torch.log_softmax(logits_CV, dim=-1, dtype=softmax_dtype(logits_CV))
        return -log_probs_CV.gather(1, self.targets_T[chunk, None])[:, 0]

    @override
    def values_and_gradient(self, logits_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        targets_C1 = self.targets_T[chunk, None]
        probs_CV, log_total_C = softmax_and_log_total(logits_CV)
        losses_C = log_total_C - logits_CV.gather(1, targets_C1)[:, 0]
        return losses_C, probs_CV.scatter_add_(1, targets_C1, -probs_CV.new_ones(targets_C1.shape))


@dataclass(frozen=True)
class ElboCost(LogitCost):
    """The integrand of the bound of a mixture path; see :class:`raydist.core.terms.ElboTerm`.

    With ``S = sum_v lambda(v) P[v]`` and ``m = 1[x != y]``, the gradient is::

        d cost / d logits[k] = P[k] (lambda(k) - S + lambda(x) P[x] + m lambda(y))
                               - 1[k = x] lambda(x) P[x] - 1[k = y] m lambda(y)

    where ``lambda(k) - S`` vanishes for rates equal for all tokens. A head may have more rows than the path has tokens;
    rates that differ per token are 0 there.
    """

    targets_T: Tensor
    current_T: Tensor
    times_T: Tensor
    rates: TokenRates

    @override
    def values(self, logits_CV: Tensor, chunk: slice) -> Tensor:
        return self._evaluate(logits_CV, chunk, with_gradient=False)[0]

    @override
    def values_and_gradient(self, logits_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        return self._evaluate(logits_CV, chunk, with_gradient=True)

    def _evaluate(self, logits_CV: Tensor, chunk: slice, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """The second value is the gradient, or the probabilities where no gradient is asked for."""
        targets_C1, current_C1 = self.targets_T[chunk, None], self.current_T[chunk, None]
        probs_CV, log_total_C = softmax_and_log_total(logits_CV)
        rates_CU = self.rates.at(self.times_T[chunk]).to(probs_CV.dtype)
        differs_per_token = rates_CU.shape[1] > 1
        if differs_per_token:
            rates_CU = F.pad(rates_CU, (0, logits_CV.shape[1] - rates_CU.shape[1]))
        current_rate_C1 = rates_CU.gather(1, current_C1) if differs_per_token else rates_CU
        target_rate_C1 = rates_CU.gather(1, targets_C1) if differs_per_token else rates_CU
        moved_C1 = current_C1 != targets_C1
        leaving_C1 = torch.where(moved_C1, target_rate_C1, 0.0)
        staying_C1 = current_rate_C1 * probs_CV.gather(1, current_C1)
        mean_rate_C1 = (rates_CU * probs_CV).sum(-1, keepdim=True) if differs_per_token else rates_CU
        log_target_C1 = logits_CV.gather(1, targets_C1) - log_total_C[:, None]
        losses_C1 = mean_rate_C1 - staying_C1 - leaving_C1 * (1 + log_target_C1)
        if not with_gradient:
            return losses_C1[:, 0], probs_CV
        pull_C1 = staying_C1 + leaving_C1
        grad_logits_CV = probs_CV.mul_(rates_CU + (pull_C1 - mean_rate_C1) if differs_per_token else pull_C1)
        grad_logits_CV.scatter_add_(1, current_C1, -staying_C1)
        return losses_C1[:, 0], grad_logits_CV.scatter_add_(1, targets_C1, -leaving_C1)


def softmax_and_log_total(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[C, V]`` and ``log sum exp`` of the logits ``[C]``.

    The largest probability is ``1 / sum(exp(logits - largest))``, and at least 1 / V: its logarithm is accurate.
    """
    probs_CV = torch.softmax(logits_CV, dim=-1, dtype=softmax_dtype(logits_CV))
    return probs_CV, logits_CV.amax(-1) - probs_CV.amax(-1).log()
