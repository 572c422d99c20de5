"""The animation: its frames against the recorded states, and the page against its data."""

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from raydist.evaluation.animation import HIDDEN, frame_pieces, frames_of, write_animation
from raydist.sampling.base import Generation

MASK_ID = 99


def text_of(tokens):
    return "".join(chr(token) for token in tokens)


def test_reveals_become_frames():
    generation = Generation(tokens=[97, 98, 99], num_forwards=4, revealed_at=[2, 4, 2], stopped=False)
    frames = frames_of(generation, mask_id=MASK_ID)
    assert [(frame.forward, frame.tokens) for frame in frames] == [
        (0, [None, None, None]),
        (2, [97, None, 99]),
        (4, [97, 98, 99]),
    ]
    assert frames[-1].born == generation.revealed_at


@given(st.lists(st.lists(st.sampled_from([97, 98, MASK_ID]), max_size=8), min_size=1, max_size=6))
def test_states_become_frames_whose_births_are_when_a_token_appeared(states):
    generation = Generation(
        tokens=states[-1], num_forwards=len(states), revealed_at=[1] * len(states[-1]), stopped=False, states=states
    )
    frames = frames_of(generation, mask_id=MASK_ID)
    for frame in frames[1:]:
        assert frame.tokens == [None if token == MASK_ID else token for token in states[frame.forward - 1]]
        for token, born in zip(frame.tokens, frame.born, strict=True):
            assert (born == 0) == (token is None)
            if token is not None:
                assert 1 <= born <= frame.forward
                assert token in states[born - 1]
    assert frames[-1].tokens == [None if token == MASK_ID else token for token in states[-1]]


def test_an_insertion_leaves_what_is_behind_it_old():
    states = [[97, 98], [97, 99, 98]]
    generation = Generation(tokens=states[-1], num_forwards=2, revealed_at=[1, 2, 1], stopped=False, states=states)
    assert frames_of(generation, mask_id=None)[-1].born == [1, 2, 1]


def test_pieces_of_a_frame_join_to_its_text():
    assert frame_pieces([97, None, None, 98, 98], decode=text_of) == ["a", HIDDEN, HIDDEN, "b", "b"]
    assert frame_pieces([], decode=text_of) == []


def test_the_page_holds_its_data_and_escapes_what_it_shows(tmp_path):
    generation = Generation(tokens=[60, 47], num_forwards=2, revealed_at=[1, 2], stopped=False)
    path = tmp_path / "trace.html"
    write_animation(
        generation, decode=text_of, mask_id=None, path=str(path), title="<b>", prompt="</script><script>alert(1)"
    )
    page = path.read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert "<h1>&lt;b&gt;</h1>" in page
    data = json.loads(re.search(r"const data = (.*);\n", page).group(1))
    assert data["prompt"] == "</script><script>alert(1)"
    assert [frame["pieces"] for frame in data["frames"]] == [[HIDDEN, HIDDEN], ["<", HIDDEN], ["<", "/"]]
