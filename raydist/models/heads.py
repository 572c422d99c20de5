"""Head terms: which rows of the hidden states meet which head at which cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from raydist.core.errors import ModelError
from raydist.core.terms import CrossEntropyTerm, HeadTerm, TermResult
from raydist.models.linear_loss import linear_cross_entropy


def evaluate_terms(hidden_BLD: Tensor, *, terms: Sequence[HeadTerm], heads: Mapping[str, Tensor]) -> list[TermResult]:
    """Evaluates each term at its own positions.

    Terms are evaluated one by one, not joined: an objective may scale their sums differently, and the weight gradient
    of a joint pass could not be told apart afterwards.

    Args:
        hidden_BLD: hidden states.
        terms: what is asked.
        heads: head name -> weight ``[V, D]``.

    Raises:
        ModelError: a term reads a head that the model does not have.
    """
    hidden_TD = hidden_BLD.flatten(0, 1)
    results = []
    for term in terms:
        if term.head not in heads:
            raise ModelError(
                "the model has no such head", where=f"term {term.name}", found=term.head, expected=", ".join(heads)
            )
        if not isinstance(term, CrossEntropyTerm):
            raise TypeError(f"no evaluation for a {type(term).__name__}")
        loss_sum, losses_T = linear_cross_entropy(
            hidden_TD.index_select(0, term.positions_T),
            weight_VD=heads[term.head],
            targets_T=term.targets_T,
            weights_T=term.weights_T,
        )
        results.append(TermResult(term=term, loss_sum=loss_sum, losses_T=losses_T))
    return results
