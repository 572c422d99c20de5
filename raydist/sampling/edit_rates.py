"""Rates of edits and laws of their tokens as a model gives them, with guidance, and the random edits of one leap.

Source: Havasi et al. 2025, "Edit Flows: Flow Matching with Edit Operations", arXiv 2506.09018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from raydist.core.edit_model import CONTEXT_FEATURE, DELETE_TOKEN, INSERT_RIGHT, SUBSTITUTE_TOKEN
from raydist.models.mask_spec import FullMask
from raydist.sampling.drawing import draw_tokens
from raydist.sampling.edit_state import EditProposal, EditState

GuidanceRule = Literal["naive", "fixed", "weighted"]
_CHUNK_LOGITS = 2**24  # 128 MiB in float64

DRAWS_PER_TOKEN = 4
INSERT, INSERTED, CHANGE, SUBSTITUTED = range(DRAWS_PER_TOKEN)
"""Uniforms of a place: whether to insert, what, whether to delete or substitute, by what."""


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

    @property
    def num_forwards(self) -> int:
        """Forwards of the model in an evaluation."""
        return 2 if self.scale else 1


@dataclass(frozen=True)
class TokenChoice:
    """How tokens are drawn from the laws Q.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: among this many; None for all.
        top_p: among the most likely tokens that hold this much probability; None for all.
        vocab_size: ids that may be drawn are below it; a model may have more rows.
        never: ids that are not drawn.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    vocab_size: int
    never: tuple[int, ...]

    def draw(self, logits_TV: Tensor, *, uniforms_T: Tensor) -> Tensor:
        """One token per row of logits, ``[T]``; overwrites the logits."""
        logits_TV = logits_TV[:, : self.vocab_size]
        logits_TV[:, list(self.never)] = -torch.inf
        return draw_tokens(
            logits_TV, uniforms_BN=uniforms_T, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )


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


def propose_edits(
    model: Any,
    state: EditState,
    *,
    time: float,
    jump: float,
    heads: EditHeads,
    guidance: Guidance,
    choice: TokenChoice,
    uniforms_BL4: Tensor,
) -> EditProposal:
    """Draws insertions, deletions and substitutions by the rates at one time, all places independently of each other.

    Tokens are read from the heads only where an edit needs one.

    Args:
        model: a decoder.
        state: the texts.
        time: when the rates are read.
        jump: J of :func:`event_probability`.
        heads: of the direction of time.
        guidance: how the two models are joined.
        choice: how tokens are drawn.
        uniforms_BL4: ``DRAWS_PER_TOKEN`` uniforms per place.
    """
    rates = edit_rates(model, state, time=time, heads=heads, guidance=guidance)

    def drawn(places_BL: Tensor, head: str, draw: int) -> Tensor:
        """A token at each of the places, ``[B, L]``, with a chunk of places' logits in memory at a time."""
        tokens_BL = torch.zeros_like(state.tokens_BL)
        rows_T, columns_T = places_BL.nonzero(as_tuple=True)
        chunk = max(1, _CHUNK_LOGITS // choice.vocab_size)
        for places in zip(rows_T.split(chunk), columns_T.split(chunk), strict=True):
            logits_CV = token_logits(model, rates, places, head=head, guidance=guidance)
            tokens_BL[places] = choice.draw(logits_CV, uniforms_T=uniforms_BL4[places][:, draw])
        return tokens_BL

    expected_BL3 = rates.log_rates_BL3.exp()
    chance_BL = event_probability(expected_BL3[..., INSERT_RIGHT], jump=jump)
    insert_BL = state.open_BL & (uniforms_BL4[..., INSERT] < chance_BL)
    inserted_BL = drawn(insert_BL, heads.insert, INSERTED)
    if heads.substitute is None:
        nowhere_BL = torch.zeros_like(insert_BL)
        return EditProposal(insert_BL, inserted_BL, nowhere_BL, nowhere_BL, state.tokens_BL)
    change_BL = expected_BL3[..., DELETE_TOKEN] + expected_BL3[..., SUBSTITUTE_TOKEN]
    chance_BL = event_probability(change_BL, jump=jump).masked_fill(~state.free_BL, 0.0)
    deletions_BL = torch.sigmoid(rates.log_rates_BL3[..., DELETE_TOKEN] - rates.log_rates_BL3[..., SUBSTITUTE_TOKEN])
    delete_BL = uniforms_BL4[..., CHANGE] < chance_BL * deletions_BL
    substitute_BL = (uniforms_BL4[..., CHANGE] < chance_BL) & ~delete_BL
    substituted_BL = drawn(substitute_BL, heads.substitute, SUBSTITUTED)
    return EditProposal(insert_BL, inserted_BL, delete_BL, substitute_BL, substituted_BL)


def event_probability(expected: Tensor, *, jump: float) -> Tensor:
    """``J x`` where x <= 1, ``1 - (1 - J)^x`` above: a probability, continuous and increasing in x, for J in [0, 1]."""
    survival = torch.tensor(1.0 - jump, dtype=expected.dtype, device=expected.device) ** expected
    return torch.where(expected <= 1, jump * expected, 1 - survival)


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
        for operation, head in ((INSERT_RIGHT, heads.insert), (SUBSTITUTE_TOKEN, heads.substitute)):
            if head is not None:
                normaliser_BL = _log_normaliser(model, hidden_BLD, unguided_BLD, head=head, scale=guidance.scale)
                shift_BL3[..., operation] += normaliser_BL
    return EditRates(log_rates_BL3 + shift_BL3.clamp(-guidance.limit, guidance.limit), hidden_BLD, unguided_BLD)


def token_logits(
    model: Any, rates: EditRates, places: Tensor | tuple[Tensor, Tensor], *, head: str, guidance: Guidance
) -> Tensor:
    """Logits of the tokens at some places only, float64 ``[T, V]``; places as bool ``[B, L]``, or as rows and columns."""
    logits_TV = model.head_logits(rates.hidden_BLD[places], head=head).double()
    if rates.unguided_BLD is None:
        return logits_TV
    unguided_TV = model.head_logits(rates.unguided_BLD[places], head=head).double()
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
        features={CONTEXT_FEATURE: state.context_BL},
    )


def _joined(logits_TV: Tensor, unguided_TV: Tensor, *, scale: float) -> Tensor:
    log_q_TV, unguided_log_q_TV = torch.log_softmax(logits_TV, dim=-1), torch.log_softmax(unguided_TV, dim=-1)
    return log_q_TV + scale * (log_q_TV - unguided_log_q_TV)


def _log_normaliser(model: Any, hidden_BLD: Tensor, unguided_BLD: Tensor, *, head: str, scale: float) -> Tensor:
    """``log sum_v Q_c(v)^(1 + w) Q_u(v)^(-w)``, ``[B, L]``, a chunk of positions' logits in memory at a time."""
    chunk = max(1, _CHUNK_LOGITS // model.config.vocab_size)
    parts = [
        _joined(
            model.head_logits(guided_CD, head=head).double(),
            model.head_logits(unguided_CD, head=head).double(),
            scale=scale,
        ).logsumexp(dim=-1)
        for guided_CD, unguided_CD in zip(
            hidden_BLD.flatten(0, 1).split(chunk), unguided_BLD.flatten(0, 1).split(chunk), strict=True
        )
    ]
    return torch.cat(parts).unflatten(0, hidden_BLD.shape[:2])
