"""What all pictures share: inks, axes without clutter, and figures that leave no global state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from raydist.core import storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Apart for every kind of colour vision (Okabe and Ito 2008)."""
INK, MUTED, SPINE, FAINT = "#22262b", "#4a5158", "#9aa2ab", "#d9dde2"
_PALEST, _DARKEST = 0.12, 0.95


def new_figure(title: str, *, width: float, height: float) -> Figure:
    """An empty white figure with a title at its top left; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK, parse_math=False)
    return figure


def save_png(figure: Figure, path: str) -> None:
    """Writes to a local or remote file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    storage.write_bytes(path, buffer.getvalue())


def style_axes(axes: Axes) -> None:
    """Left and bottom lines only, a faint grid behind what is drawn."""
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SPINE)
    axes.tick_params(colors=MUTED)


def graded(goodness: float) -> str:
    """A colour from pale green (0) to dark violet (1), of even steps and legible on white."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis_r"](_PALEST + (_DARKEST - _PALEST) * goodness))
