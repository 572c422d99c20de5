"""Simultaneous edits against a plain walk over the old text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.core.edit_model import CLOSED, FREE, OPEN
from raydist.sampling.edit_state import EditProposal, EditState, apply_edits

BEGIN = 9


def walked(first, free, last, edits, *, limit):
    """Left to right: drop, replace or keep each old token, then its insertion while there is room."""
    text = [BEGIN, *first, *free, *last]
    room = limit - sum(edit["change"] != "delete" for edit in edits[len(first) + 1 : len(first) + 1 + len(free)])
    result = []
    for token, edit in zip(text, edits, strict=True):
        if edit["change"] == "substitute":
            result.append((edit["symbol"], 5))
        elif edit["change"] != "delete":
            result.append((token, 0))
        if edit["insert"] and room > 0:
            result.append((edit["inserted"], 5))
            room -= 1
    return result


@st.composite
def cases(draw):
    tokens = st.lists(st.integers(0, 4), max_size=4)
    first, free, last = draw(tokens), draw(tokens), draw(tokens)
    edits = []
    for place in range(1 + len(first) + len(free) + len(last)):
        is_free = 1 + len(first) <= place < 1 + len(first) + len(free)
        edits.append(
            {
                "insert": draw(st.booleans()) if is_free or place == len(first) else False,
                "inserted": draw(st.integers(5, 8)),
                "change": draw(st.sampled_from(["keep", "delete", "substitute"])) if is_free else "keep",
                "symbol": draw(st.integers(5, 8)),
            }
        )
    return first, free, last, edits


def stacked(all_edits, key, *, width, pad):
    return torch.tensor([[edit[key] for edit in edits] + [pad] * (width - len(edits)) for edits in all_edits])


@settings(max_examples=120, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=4), st.integers(4, 9))
def test_11_simultaneous_edits_equal_the_plain_walk(batch, limit):
    firsts, frees, lasts, all_edits = (list(part) for part in zip(*batch, strict=True))
    state = EditState.of(
        [[BEGIN, *first] for first in firsts], frees, lasts, limit=limit, fill=BEGIN, device=torch.device("cpu")
    )
    width = state.tokens_BL.shape[1]
    change = [[edit["change"] for edit in edits] + ["keep"] * (width - len(edits)) for edits in all_edits]
    proposal = EditProposal(
        insert_BL=stacked(all_edits, "insert", width=width, pad=False),
        inserted_BL=stacked(all_edits, "inserted", width=width, pad=0),
        delete_BL=torch.tensor([[one == "delete" for one in row] for row in change]),
        substitute_BL=torch.tensor([[one == "substitute" for one in row] for row in change]),
        substituted_BL=stacked(all_edits, "symbol", width=width, pad=0),
    )
    after = apply_edits(state, proposal, forward=5)
    for row, (first, free, last, edits) in enumerate(batch):
        expected = walked(first, free, last, edits, limit=limit)
        length = int(after.lengths_B[row])
        assert list(zip(after.tokens_BL[row].tolist(), after.born_BL[row].tolist(), strict=True))[:length] == expected
        assert length <= 1 + len(first) + limit + len(last)
        assert after.tokens_BL[row, 0] == BEGIN
        inner = [token for token, _ in expected[1 + len(first) : len(expected) - len(last)]]
        assert after.free_lists(after.tokens_BL)[row] == inner


def test_a_full_text_takes_insertions_from_the_left_after_its_deletions():
    state = EditState.of([[BEGIN]], [[0, 1, 2]], [[]], limit=3, fill=BEGIN, device=torch.device("cpu"))
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    nowhere = ~everywhere
    sevens = torch.full((1, 4), 7)
    full = apply_edits(state, EditProposal(everywhere, sevens, nowhere, nowhere, sevens), forward=1)
    assert full.tokens_BL.tolist() == [[BEGIN, 0, 1, 2]]
    delete = torch.tensor([[False, False, False, True]])
    freed = apply_edits(state, EditProposal(everywhere, sevens, delete, nowhere, sevens), forward=1)
    assert freed.tokens_BL.tolist() == [[BEGIN, 7, 0, 1]]
    emptied = apply_edits(state, EditProposal(nowhere, sevens, state.free_BL, nowhere, sevens), forward=1)
    assert emptied.tokens_BL.tolist() == [[BEGIN]]


@pytest.mark.parametrize("last", [[], [6, 6]])
def test_places_that_may_be_edited(last):
    state = EditState.of(
        [[BEGIN, 5], [BEGIN]], [[0, 1], []], [last, last], limit=4, fill=BEGIN, device=torch.device("cpu")
    )
    ends = [CLOSED] * len(last)
    assert state.context_BL[0].tolist() == [CLOSED, OPEN, FREE, FREE, *ends]
    assert state.context_BL[1, : 1 + len(last)].tolist() == [OPEN, *ends]
    alone = state.without_given()
    assert alone.lengths_B.tolist() == [3, 1]
    assert alone.tokens_BL[0, :3].tolist() == [BEGIN, 0, 1]
    assert alone.context_BL[0, :3].tolist() == [OPEN, FREE, FREE]
