"""The cost of the likelihood bound of a path whose velocity couples all tokens; see :mod:`raydist.models.head_costs`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydist.core.terms import TokenTransitions
from raydist.models.head_costs import LogitCost, softmax_and_log_total

_LARGEST_RATIO = 1e18  # of rates, so that products with them stay finite where a probability underflows


@dataclass(frozen=True)
class PathElboCost(LogitCost):
    """The integrand of the bound of any path; see :class:`raydist.core.terms.PathElboTerm`.

    Positions with the same time and the same current token share one table of V^2 rates, and their model rates are one
    matrix product with it. With ``g[k] = sum_y u_t(y, x | k) (1 - u(y) / v(y))`` the gradient is::

        d cost / d logits[k] = P[k] (g[k] - sum_j P[j] g[j])

    A head may have more rows than the path has tokens; those have no rates.
    """

    targets_T: Tensor
    current_T: Tensor
    times_T: Tensor
    transitions: TokenTransitions

    @override
    def values(self, logits_CV: Tensor, chunk: slice) -> Tensor:
        probs_CV, _ = softmax_and_log_total(logits_CV)
        costs_C = torch.empty_like(probs_CV[:, 0])
        for positions_N, table_VV in self._groups(chunk, dtype=probs_CV.dtype):
            model_NV, target_NV = self._rates(probs_CV, chunk, positions_N, table_VV)
            costs_C[positions_N] = _divergence(target_NV, model_NV)
        return costs_C

    @override
    def values_and_gradient(self, logits_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        probs_CV, _ = softmax_and_log_total(logits_CV)
        costs_C, pulls_CV = torch.empty_like(probs_CV[:, 0]), torch.zeros_like(probs_CV)
        for positions_N, table_VV in self._groups(chunk, dtype=probs_CV.dtype):
            model_NV, target_NV = self._rates(probs_CV, chunk, positions_N, table_VV)
            costs_C[positions_N] = _divergence(target_NV, model_NV)
            pulls_NV = (1 - (target_NV / model_NV).clamp(max=_LARGEST_RATIO)) @ table_VV.t()
            pulls_CV[positions_N] = F.pad(pulls_NV, (0, pulls_CV.shape[1] - pulls_NV.shape[1]))
        mean_C1 = (probs_CV * pulls_CV).sum(-1, keepdim=True)
        return costs_C, probs_CV.mul_(pulls_CV - mean_C1)

    def _rates(self, probs_CV: Tensor, chunk: slice, positions_N: Tensor, table_VV: Tensor) -> tuple[Tensor, Tensor]:
        """Model rates, above zero, and the path's own, both ``[N, V]``."""
        smallest = torch.finfo(table_VV.dtype).tiny
        model_NV = probs_CV[positions_N, : table_VV.shape[0]] @ table_VV
        return model_NV.clamp(min=smallest), table_VV[self.targets_T[chunk][positions_N]]

    def _groups(self, chunk: slice, *, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions of the chunk that share time and current token, and the rates ``[V, V]`` there."""
        current_C = self.current_T[chunk]
        times_U, time_of_C = torch.unique(self.times_T[chunk], return_inverse=True)
        for number, time in enumerate(times_U.to(dtype)):
            at_time_M = (time_of_C == number).nonzero()[:, 0]
            tokens_G, token_of_M = torch.unique(current_C[at_time_M], return_inverse=True)
            sorted_M, counts_G = token_of_M.argsort(stable=True), token_of_M.bincount(minlength=len(tokens_G))
            groups = at_time_M[sorted_M].split(counts_G.tolist())
            yield from zip(groups, self.transitions.tables(time, current_G=tokens_G), strict=True)


def _divergence(target_NV: Tensor, model_NV: Tensor) -> Tensor:
    """``sum_y v(y) - u(y) + u(y) log(u(y) / v(y))``, ``[N]``: zero where the rates agree, else above."""
    surprise_NV = torch.xlogy(target_NV, target_NV) - torch.xlogy(target_NV, model_NV)
    return (model_NV - target_NV + surprise_NV).sum(-1)
