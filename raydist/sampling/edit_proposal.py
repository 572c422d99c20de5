"""The random edits of one leap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydist.sampling.drawing import draw_tokens
from raydist.sampling.edit_rates import EditHeads, EditRates, Guidance, token_logits
from raydist.sampling.edit_state import EditProposal, EditState

DRAWS_PER_TOKEN = 4
INSERT, INSERTED, CHANGE, SUBSTITUTED = range(DRAWS_PER_TOKEN)
"""Uniforms of a place: whether to insert, what, whether to delete or substitute, by what."""


@dataclass(frozen=True)
class TokenChoice:
    """How tokens are drawn from the laws Q.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: among this many; None for all.
        top_p: among the most likely tokens that hold this much probability; None for all.
        never: ids that are not drawn.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    never: tuple[int, ...]

    def draw(self, logits_TV: Tensor, *, uniforms_T: Tensor) -> Tensor:
        """One token per row of logits, ``[T]``."""
        logits_TV[:, list(self.never)] = -torch.inf
        return draw_tokens(
            logits_TV[None],
            uniforms_BN=uniforms_T[None],
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )[0]


def event_probability(expected: Tensor, *, jump: float) -> Tensor:
    """``J x`` where x <= 1, ``1 - (1 - J)^x`` above: a probability, continuous and increasing in x, for J in [0, 1]."""
    survival = torch.tensor(1.0 - jump, dtype=expected.dtype, device=expected.device) ** expected
    return torch.where(expected <= 1, jump * expected, 1 - survival)


def propose_edits(
    model: Any,
    state: EditState,
    rates: EditRates,
    *,
    jump: float,
    heads: EditHeads,
    guidance: Guidance,
    choice: TokenChoice,
    uniforms_BL4: Tensor,
) -> EditProposal:
    """Draws insertions, deletions and substitutions, all places independently of each other.

    Tokens are read from the heads only where an edit needs one.

    Args:
        model: a decoder.
        state: the texts.
        rates: of the texts.
        jump: J of :func:`event_probability`.
        heads: of the direction of time.
        guidance: how the two models are joined.
        choice: how tokens are drawn.
        uniforms_BL4: ``DRAWS_PER_TOKEN`` uniforms per place.
    """
    expected_BL3 = rates.log_rates_BL3.exp()
    insert_BL = state.open_BL & (uniforms_BL4[..., INSERT] < event_probability(expected_BL3[..., 0], jump=jump))
    logits_TV = token_logits(model, rates, insert_BL, head=heads.insert, guidance=guidance)
    inserted_BL = torch.zeros_like(state.tokens_BL)
    inserted_BL[insert_BL] = choice.draw(logits_TV, uniforms_T=uniforms_BL4[..., INSERTED][insert_BL])
    delete_BL = substitute_BL = torch.zeros_like(insert_BL)
    substituted_BL = torch.zeros_like(state.tokens_BL)
    if heads.substitute is not None:
        change_BL = expected_BL3[..., 1] + expected_BL3[..., 2]
        chance_BL = event_probability(change_BL, jump=jump).masked_fill(~state.free_BL, 0.0)
        delete_BL = uniforms_BL4[..., CHANGE] < chance_BL * torch.sigmoid(
            rates.log_rates_BL3[..., 1] - rates.log_rates_BL3[..., 2]
        )
        substitute_BL = (uniforms_BL4[..., CHANGE] < chance_BL) & ~delete_BL
        logits_TV = token_logits(model, rates, substitute_BL, head=heads.substitute, guidance=guidance)
        draws_T = uniforms_BL4[..., SUBSTITUTED][substitute_BL]
        substituted_BL[substitute_BL] = choice.draw(logits_TV, uniforms_T=draws_T)
    return EditProposal(insert_BL, inserted_BL, delete_BL, substitute_BL, substituted_BL)
