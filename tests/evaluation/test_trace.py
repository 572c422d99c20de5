import io

import matplotlib.image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from raydist.evaluation.trace import draw_trace, lay_out, token_pieces, trace_figure
from raydist.sampling.base import Generation

PIECES = ["def", " ", "f", "(", "x", ")", ":", "\n", "    ", "return $x$", "\n\n", "é日本"]
REVEALED_AT = [2, 2, 3, 4, 2, 3, 3, 4, 5, 5, 6, 5]


def generation_of(revealed_at):
    tokens = list(range(len(revealed_at)))
    return Generation(tokens=tokens, num_forwards=max(revealed_at), revealed_at=revealed_at, stopped=False)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(alphabet="ab \n日é", max_size=9), max_size=12), st.text(alphabet="pq\n", max_size=9))
def test_layout_shows_every_character_once_in_order_and_nothing_overlaps(pieces, prompt):
    cells = lay_out(pieces, prompt=prompt, columns=10)
    for token, piece in enumerate([prompt, *pieces], start=-1):
        shown = "".join(cell.text for cell in cells if cell.token == token)
        assert shown == (piece.replace("\n", "↵") if piece or token < 0 else "·")
    places = [(cell.row, cell.column + i) for cell in cells for i in range(cell.width)]
    assert places == sorted(set(places))
    assert all(cell.column + cell.width <= 10 for cell in cells)


def test_a_line_end_ends_its_row():
    cells = lay_out(["a\n", "b"], columns=10)
    assert [(cell.row, cell.column, cell.text) for cell in cells] == [(0, 0, "a↵"), (1, 0, "b")]


def test_pieces_join_to_the_text_even_inside_a_character():
    text = "naïve 日本 🙂 end"
    tokens = list(text.encode())
    pieces = token_pieces(tokens, decode=lambda ids: bytes(ids).decode(errors="replace"))
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text
    assert pieces[2:4] == ["", "ï"]


def test_pieces_keep_an_unfinished_last_character_visible():
    tokens = list("a日".encode())[:-1]
    assert "".join(token_pieces(tokens, decode=lambda ids: bytes(ids).decode(errors="replace"))) == "a\ufffd"


def test_colour_is_the_forward_and_the_counts_are_written():
    figure = trace_figure(generation_of(REVEALED_AT), PIECES, title="a title", prompt="# ")
    text_axes = figure.axes[0]
    boxes = [patch for patch in text_axes.patches if isinstance(patch, Rectangle)]
    cells = lay_out(PIECES, prompt="# ")
    assert len(boxes) == len(cells)
    colours = {}
    for box, cell in zip(boxes, cells, strict=True):
        forward = 0 if cell.token < 0 else REVEALED_AT[cell.token]
        assert colours.setdefault(forward, box.get_facecolor()) == box.get_facecolor()
    assert len(set(colours.values())) == len(colours) == 6
    written = " ".join(text.get_text() for text in figure.texts)
    assert "a title" in written
    assert "12 tokens in 6 forwards: 2.00 tokens per forward" in written
    numbers = [text.get_text() for text in text_axes.texts if text.get_text() in "23456"]
    assert sorted(numbers) == sorted(str(REVEALED_AT[cell.token]) for cell in cells if cell.token >= 0)


@pytest.mark.parametrize("revealed_at", [REVEALED_AT, [1], [7, 7, 7], list(range(1, 100))])
def test_picture_is_written_and_not_blank(tmp_path, revealed_at):
    pieces = (PIECES * 10)[: len(revealed_at)]
    path = tmp_path / "trace.png"
    draw_trace(generation_of(revealed_at), pieces, path=str(path), title="greedy")
    picture = matplotlib.image.imread(io.BytesIO(path.read_bytes()))
    assert picture.std() > 0.02
    assert (picture[-1, :, :3] == 1).all()
