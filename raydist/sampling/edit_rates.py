"""Rates of edits and laws of their tokens, as a model gives them, with guidance.

Source: Havasi et al. 2025, "Edit Flows: Flow Matching with Edit Operations", arXiv 2506.09018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from raydist.models.mask_spec import FullMask
from raydist.sampling.edit_state import EditState

GuidanceRule = Literal["naive", "fixed", "weighted"]
_NORMALISER_POSITIONS = 1024


@dataclass(frozen=True)
class EditHeads:
    """The heads of one direction of time; None where the model never learnt the operation."""

    rates: str
    insert: str
    substitute: str | None


@dataclass(frozen=True)
class Guidance:
    """How the conditional and the unconditional model are joined; per operation, with rates l and laws Q::

        naive      l' = l_c^(1 + w) l_u^(-w),   Q' ~ Q_c^(1 + w) Q_u^(-w)
        fixed      l' = l_c,                    Q' as above
        weighted   the power of the whole rate: l' of naive times the sum of Q_c^(1 + w) Q_u^(-w)

    The paper uses naive and finds weighted worse. The factor ``l' / l_c`` is held between ``exp(-limit)`` and ``exp(limit)``,
    because it explodes where l_u is near 0.

    Attributes:
        scale: w; 0 reads the conditional model alone.
        rule: see above.
        limit: of the logarithm of the factor. Our choice.
    """

    scale: float
    rule: GuidanceRule
    limit: float


@dataclass(frozen=True)
class EditRates:
    """What one step needs of the model.

    Attributes:
        log_rates_BL3: logarithms of the rates of insertion, deletion and substitution relative to the schedule's.
        hidden_BLD: hidden states of the conditional model.
        unguided_BLD: hidden states of the unconditional model at the same tokens, or None.
    """

    log_rates_BL3: Tensor
    hidden_BLD: Tensor
    unguided_BLD: Tensor | None


def edit_rates(model: Any, state: EditState, *, time: float, heads: EditHeads, guidance: Guidance) -> EditRates:
    """One forward, or two with guidance."""
    hidden_BLD = _hidden(model, state, time)
    log_rates_BL3 = model.head_logits(hidden_BLD, head=heads.rates).double()
    if guidance.scale == 0:
        return EditRates(log_rates_BL3, hidden_BLD, None)
    source_BL = (state.index_L - (state.num_first_B - 1)[:, None]).clamp(min=0)
    alone_BLD = _hidden(model, state.without_given(), time)
    unguided_BLD = alone_BLD.gather(1, source_BL[..., None].expand_as(alone_BLD))
    if guidance.rule == "fixed":
        return EditRates(log_rates_BL3, hidden_BLD, unguided_BLD)
    shift_BL3 = guidance.scale * (log_rates_BL3 - model.head_logits(unguided_BLD, head=heads.rates).double())
    if guidance.rule == "weighted":
        for operation, head in ((0, heads.insert), (2, heads.substitute)):
            if head is not None:
                normaliser_BL = _log_normaliser(model, hidden_BLD, unguided_BLD, head=head, scale=guidance.scale)
                shift_BL3[..., operation] += normaliser_BL
    return EditRates(log_rates_BL3 + shift_BL3.clamp(-guidance.limit, guidance.limit), hidden_BLD, unguided_BLD)


def token_logits(model: Any, rates: EditRates, chosen_BL: Tensor, *, head: str, guidance: Guidance) -> Tensor:
    """Logits of the tokens at the chosen places only, float64 ``[T, V]``, in row order."""
    logits_TV = model.head_logits(rates.hidden_BLD[chosen_BL], head=head).double()
    if rates.unguided_BLD is None:
        return logits_TV
    unguided_TV = model.head_logits(rates.unguided_BLD[chosen_BL], head=head).double()
    return _joined(logits_TV, unguided_TV, scale=guidance.scale)


def _hidden(model: Any, state: EditState, time: float) -> Tensor:
    num_rows, length = state.tokens_BL.shape
    padding_BL = (state.index_L >= state.lengths_B[:, None]).long()
    device = state.tokens_BL.device
    return model.hidden(
        state.tokens_BL,
        state.index_L.expand(num_rows, -1),
        FullMask(length=length, documents_BL=padding_BL),
        time_BL=torch.full((num_rows, 1), time, dtype=torch.float32, device=device),
        features={"context": state.context_BL},
    )


def _joined(logits_TV: Tensor, unguided_TV: Tensor, *, scale: float) -> Tensor:
    log_q_TV, unguided_log_q_TV = torch.log_softmax(logits_TV, dim=-1), torch.log_softmax(unguided_TV, dim=-1)
    return log_q_TV + scale * (log_q_TV - unguided_log_q_TV)


def _log_normaliser(model: Any, hidden_BLD: Tensor, unguided_BLD: Tensor, *, head: str, scale: float) -> Tensor:
    """``log sum_v Q_c(v)^(1 + w) Q_u(v)^(-w)``, ``[B, L]``, a few positions' logits in memory at a time."""
    parts = [
        _joined(
            model.head_logits(guided_CD, head=head).double(),
            model.head_logits(unguided_CD, head=head).double(),
            scale=scale,
        ).logsumexp(dim=-1)
        for guided_CD, unguided_CD in zip(
            hidden_BLD.flatten(0, 1).split(_NORMALISER_POSITIONS),
            unguided_BLD.flatten(0, 1).split(_NORMALISER_POSITIONS),
            strict=True,
        )
    ]
    return torch.cat(parts).unflatten(0, hidden_BLD.shape[:2])
