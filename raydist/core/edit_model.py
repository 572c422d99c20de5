"""What a model of Edit Flows is told of its tokens, and in which order its rates come.

Shared by the objective that trains it and the sampler that reads it (:mod:`raydist.objectives.edit_flow`,
:mod:`raydist.sampling.edit_flow`).
"""

from __future__ import annotations

from raydist.core.token_ids import TokenIds

CONTEXT_FEATURE = "context"
NUM_CONTEXTS = 3
FREE, CLOSED, OPEN = range(NUM_CONTEXTS)
"""Values of the input feature: a token that may be edited; a given one with nothing to come directly behind it; a given one
with room behind it. The begin token is given."""

NUM_OPERATIONS = 3
INSERT_RIGHT, DELETE_TOKEN, SUBSTITUTE_TOKEN = range(NUM_OPERATIONS)
"""Outputs of the rate heads, in this order. An insertion stands to the right of its position."""


def begin_token(ids: TokenIds) -> int | None:
    """What stands in front of every text: the begin-of-text token, or the end-of-text token where there is none."""
    return ids.bos if ids.bos is not None else ids.eos
