"""Head terms: which rows of the hidden states meet which head at which cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from raydist.core.errors import ModelError
from raydist.core.terms import CrossEntropyTerm, ElboTerm, HeadTerm, PathElboTerm, PoissonTerm, TermResult
from raydist.models.head_costs import CrossEntropyCost, ElboCost, LogitCost
from raydist.models.linear_loss import linear_loss, linear_poisson
from raydist.models.path_elbo import PathElboCost


def evaluate_terms(hidden_BLD: Tensor, *, terms: Sequence[HeadTerm], heads: Mapping[str, Tensor]) -> list[TermResult]:
    """Evaluates each term at its own positions.

    Terms are evaluated one by one, not joined: an objective may scale their sums differently, and the weight gradient
    of a joint pass could not be told apart afterwards.

    Args:
        hidden_BLD: hidden states.
        terms: what is asked.
        heads: head name -> weight ``[outputs, D]``.

    Raises:
        ModelError: a term reads a head that the model does not have.
    """
    hidden_TD = hidden_BLD.flatten(0, 1)
    results = []
    for term in terms:
        weight = require_head(heads, term.head, where=f"term {term.name}")
        loss_sum, losses_T = _evaluate(term, hidden_TD.index_select(0, term.positions_T), weight=weight)
        results.append(TermResult(term=term, loss_sum=loss_sum, losses_T=losses_T))
    return results


def require_head(heads: Mapping[str, Tensor], head: str, *, where: str) -> Tensor:
    """A head's weight.

    Raises:
        ModelError: there is no such head.
    """
    if head not in heads:
        raise ModelError("the model has no such head", where=where, found=head, expected=", ".join(heads))
    return heads[head]


def _evaluate(term: HeadTerm, hidden_TD: Tensor, *, weight: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(term, PoissonTerm):
        return linear_poisson(
            hidden_TD,
            weight_KD=weight,
            exposure_TK=term.exposure_TK,
            counts_TK=term.counts_TK,
            weights_T=term.weights_T,
        )
    return linear_loss(hidden_TD, weight_VD=weight, cost=_logit_cost(term), weights_T=term.weights_T)


def _logit_cost(term: HeadTerm) -> LogitCost:
    if isinstance(term, CrossEntropyTerm):
        return CrossEntropyCost(targets_T=term.targets_T)
    if isinstance(term, ElboTerm):
        return ElboCost(targets_T=term.targets_T, current_T=term.current_T, times_T=term.times_T, rates=term.rates)
    if isinstance(term, PathElboTerm):
        return PathElboCost(
            targets_T=term.targets_T, current_T=term.current_T, times_T=term.times_T, transitions=term.transitions
        )
    raise TypeError(f"no evaluation for a {type(term).__name__}")
