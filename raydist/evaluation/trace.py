"""A picture of a decoding trace: the text as it reads, each token in the colour of the forward that revealed it."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydist.sampling.base import Generation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 84
_FONT_PT = 11.0
_NUMBER_PT = 5.5
_CHAR_INCHES = 0.602 * _FONT_PT / 72  # advance of DejaVu Sans Mono
_ROW_INCHES = 0.33
_MARGIN_INCHES, _HEADER_INCHES, _FOOTER_INCHES = 0.35, 0.95, 0.75
_NEWLINE = "↵"
_NO_TEXT = "·"
_PROMPT_COLOUR, _INK = "#eceff1", "#1c262b"
_WHITE_SHARE = 0.45  # mixed into the colours, so that dark text is legible on all of them


@dataclass(frozen=True)
class Cell:
    """A stretch of one token on one row; a token that wraps or holds line ends has several.

    Attributes:
        token: index of the token; -1 for the prompt.
        row: line of the picture, from 0.
        column: character column of its left edge.
        width: character columns.
        text: what is written there.
    """

    token: int
    row: int
    column: int
    width: int
    text: str


def token_pieces(tokens: Sequence[int], *, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds; joined they are the whole text.

    A character whose bytes are spread over several tokens belongs to the last of them; the others add nothing.
    """
    pieces: list[str] = []
    start, shown = 0, ""  # the tokens of characters that are not finished yet, and what of them is shown
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[start:end])
        finished = end == len(tokens) or not text.endswith("\ufffd")
        text = text if finished else text.rstrip("\ufffd")
        pieces.append(text[len(shown) :])
        start, shown = (end, "") if finished else (start, text)
    return pieces


def lay_out(pieces: Sequence[str], *, prompt: str = "", columns: int = _COLUMNS) -> list[Cell]:
    """Places prompt and tokens on rows of at most ``columns`` characters; a line end is shown and ends its row."""
    cells: list[Cell] = []
    row = column = 0
    for token, piece in enumerate([prompt, *pieces], start=-1):
        start, text = column, ""
        for char in _visible(piece) if piece or token < 0 else _NO_TEXT:
            width = _char_columns(char)
            if column + width > columns:
                if text:
                    cells.append(Cell(token, row, start, column - start, text))
                row, column, start, text = row + 1, 0, 0, ""
            text += char
            column += width
            if char == _NEWLINE:
                cells.append(Cell(token, row, start, column - start, text))
                row, column, start, text = row + 1, 0, 0, ""
        if text:
            cells.append(Cell(token, row, start, column - start, text))
    return cells


def _char_columns(char: str) -> int:
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _visible(text: str) -> str:
    text = text.replace("\t", "    ").replace("\n", _NEWLINE)
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def trace_figure(generation: Generation, pieces: Sequence[str], *, title: str, prompt: str = "") -> Figure:
    """The picture as a matplotlib figure, drawn without any global state.

    Args:
        generation: tokens and the forwards in which they were revealed.
        pieces: the text of each generated token (see :func:`token_pieces`).
        title: above the text.
        prompt: shown before the tokens, in grey.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    cells = lay_out(pieces, prompt=prompt)
    num_rows = 1 + max((cell.row for cell in cells), default=0)
    width = _COLUMNS * _CHAR_INCHES + 2 * _MARGIN_INCHES
    height = num_rows * _ROW_INCHES + _HEADER_INCHES + _FOOTER_INCHES
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    axes = figure.add_axes(
        (
            _MARGIN_INCHES / width,
            _FOOTER_INCHES / height,
            1 - 2 * _MARGIN_INCHES / width,
            num_rows * _ROW_INCHES / height,
        )
    )
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(num_rows, 0)
    axes.set_axis_off()
    first, last = min(generation.revealed_at, default=1), max(generation.revealed_at, default=1)
    num_colours = last - first + 1
    steps = [index / max(1, num_colours - 1) for index in range(num_colours)]
    colours = ListedColormap([_paler(colormaps["turbo"](0.08 + 0.84 * step)) for step in steps])
    norm = BoundaryNorm([forward - 0.5 for forward in range(first, last + 2)], num_colours)
    for cell in cells:
        if cell.token < 0:
            _draw_cell(axes, cell, colour=_PROMPT_COLOUR, number=None)
        else:
            forward = generation.revealed_at[cell.token]
            _draw_cell(axes, cell, colour=colours(norm(forward)), number=forward)
    _draw_header(figure, generation, title=title, left=_MARGIN_INCHES / width, height=height, prompt=prompt)
    _draw_colour_bar(figure, colours, norm, span=(first, last), width=width, height=height)
    return figure


def draw_trace(generation: Generation, pieces: Sequence[str], *, path: str, title: str, prompt: str = "") -> None:
    """Writes :func:`trace_figure` to a local PNG (or, by its ending, PDF or SVG) file."""
    figure = trace_figure(generation, pieces, title=title, prompt=prompt)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # such a character is drawn as a box
        figure.savefig(path)


def _paler(rgba: Sequence[float]) -> tuple[float, ...]:
    return tuple(_WHITE_SHARE + (1 - _WHITE_SHARE) * channel for channel in rgba[:3])


def _draw_cell(axes: Any, cell: Cell, *, colour: Any, number: int | None) -> None:
    from matplotlib.patches import Rectangle

    box = (cell.column + 0.04, cell.row + 0.04), cell.width - 0.08, 0.92
    axes.add_patch(Rectangle(*box, facecolor=colour, edgecolor="none"))
    column = float(cell.column)
    style = {"family": "DejaVu Sans Mono", "fontsize": _FONT_PT, "color": _INK, "ha": "center", "parse_math": False}
    for char in cell.text:  # one by one: hinted advances would drift from the grid over a long word
        width = _char_columns(char)
        if not char.isspace():
            axes.text(column + width / 2, cell.row + 0.53, char, va="baseline", **style)
        column += width
    if number is not None:
        fitting_pt = cell.width * 72 * _CHAR_INCHES / (0.68 * len(str(number)))
        place, size = (cell.column + cell.width / 2, cell.row + 0.81), min(_NUMBER_PT, fitting_pt)
        axes.text(*place, str(number), fontsize=size, color=_INK, alpha=0.8, ha="center", va="center")


def _draw_header(
    figure: Figure, generation: Generation, *, title: str, left: float, height: float, prompt: str
) -> None:
    counts = (
        f"{len(generation.tokens)} tokens in {generation.num_forwards} forwards: "
        f"{generation.tokens_per_forward:.2f} tokens per forward"
    )
    key = "colour and small number: the forward that revealed a token" + ("; grey: the prompt" if prompt else "")
    for text, inches, size, colour in ((title, 0.30, 13, _INK), (counts, 0.54, 10, _INK), (key, 0.75, 8, "#607d8b")):
        weight = "bold" if text is title else "normal"
        y = 1 - inches / height
        figure.text(left, y, text, fontsize=size, weight=weight, color=colour, va="center", parse_math=False)


def _draw_colour_bar(
    figure: Figure, colours: Any, norm: Any, *, span: tuple[int, int], width: float, height: float
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator

    left, bar_height = _MARGIN_INCHES / width, 0.12 / height
    axes = figure.add_axes((left, 0.44 / height, 1 - 2 * left, bar_height))
    ticks = [tick for tick in MaxNLocator(nbins=12, integer=True).tick_values(*span) if span[0] <= tick <= span[1]]
    bar = figure.colorbar(ScalarMappable(norm=norm, cmap=colours), cax=axes, orientation="horizontal", ticks=ticks)
    bar.ax.tick_params(labelsize=7, length=2, colors=_INK)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label("forward", fontsize=8, color=_INK, labelpad=1)
