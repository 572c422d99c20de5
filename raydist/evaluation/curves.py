"""A picture of how a run went: losses on one panel, what explains them on small ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raydist.core.units import format_count
from raydist.evaluation.figures import COLOURS, INK, new_figure, save_png, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[int, float]]

_SMALL_PANELS = {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens / s"}
_NOISELESS = ("learning_rate",)
_HALF_LIFE_SHARE = 0.006
_LONG_CURVE_POINTS = 30


def smoothed(curve: Curve, *, half_life_steps: float) -> list[tuple[int, float]]:
    """Two-sided exponential average, which unlike a running one does not lag behind a falling loss.

    .. math:: y_i = \\frac{\\sum_j w^{|s_i - s_j|} x_j}{\\sum_j w^{|s_i - s_j|}}, \\quad w = 2^{-1/h}

    so that unevenly spaced steps are weighted by their distance. Non-finite values are left out.

    Args:
        curve: ``(step, value)``, sorted by step.
        half_life_steps: distance h at which a value counts half.
    """
    finite = _finite(curve)
    before = _decayed_sums(finite, half_life_steps)
    after = _decayed_sums([(-step, value) for step, value in reversed(finite)], half_life_steps)[::-1]
    result = []
    for (step, value), (left, left_weight), (right, right_weight) in zip(finite, before, after, strict=True):
        result.append((step, (left + right - value) / (left_weight + right_weight - 1.0)))
    return result


def _decayed_sums(curve: Curve, half_life_steps: float) -> list[tuple[float, float]]:
    """For each point the sums of values and of weights of all points up to it."""
    total = weight = 0.0
    sums = []
    last_step = curve[0][0] if curve else 0
    for step, value in curve:
        decay = 2.0 ** (-(step - last_step) / half_life_steps)
        total, weight, last_step = decay * total + value, decay * weight + 1.0, step
        sums.append((total, weight))
    return sums


def _finite(curve: Curve) -> list[tuple[int, float]]:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def draw_curves(curves: Mapping[str, Curve], path: str, title: str) -> None:
    """Writes a PNG of a run's curves.

    Training losses are drawn raw and faint with their average on top, validation as marked lines, and steps whose loss
    is not a number as crosses at the bottom.

    Args:
        curves: ``(step, value)`` by metric, as :func:`raydist.tracking.jsonl.read_curve` returns them.
        path: local or remote file.
        title: over the picture.
    """
    small = [key for key in _SMALL_PANELS if curves.get(key)]
    figure = new_figure(title, width=11, height=5.2)
    grid = figure.add_gridspec(max(1, len(small)), 2 if small else 1, width_ratios=[2.3, 1] if small else None)
    losses = figure.add_subplot(grid[:, 0])
    _draw_losses(losses, curves)
    for row, key in enumerate(small):
        _draw_small(figure.add_subplot(grid[row, 1]), curves[key], key, last=row == len(small) - 1)
    save_png(figure, path)


def _draw_losses(axes: Axes, curves: Mapping[str, Curve]) -> None:
    names = [key for key in curves if key == "loss" or key.startswith("loss/")]
    names.sort(key=lambda key: (key != "loss", key))
    for colour, name in zip(COLOURS, names, strict=False):
        _draw_training(axes, curves[name], name, colour=colour)
        _draw_validation(axes, curves.get(f"validation/{name}", ()), f"validation/{name}", colour=colour)
    _fit_height(axes, curves, names)
    _style(axes)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per target)", color=INK)
    if names:
        axes.legend(frameon=False, fontsize=9, loc="upper right", labelcolor=INK)


def _draw_training(axes: Axes, curve: Curve, name: str, *, colour: str) -> None:
    last = _draw_with_average(axes, curve, colour=colour)
    if last is not None:
        axes.lines[-1].set_label(f"{name}  {last:.4g}")
    broken = [step for step, value in curve if not math.isfinite(value)]
    if broken:
        where = axes.get_xaxis_transform()
        axes.plot(broken, [0.02] * len(broken), "x", color=colour, transform=where, label=f"{name} is not a number")


def _draw_with_average(axes: Axes, curve: Curve, *, colour: str, noisy: bool = True) -> float | None:
    """Draws a curve, a long noisy one faint under its average; returns the last value of the line drawn last."""
    line = _finite(curve)
    if not line:
        return None
    if noisy and len(line) >= _LONG_CURVE_POINTS:
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=0.8, alpha=0.28)
        line = smoothed(line, half_life_steps=_HALF_LIFE_SHARE * (line[-1][0] - line[0][0]))
    axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.8)
    return line[-1][1]


def _draw_validation(axes: Axes, curve: Curve, name: str, *, colour: str) -> None:
    line = _finite(curve)
    if line:
        axes.plot(
            *zip(*line, strict=True),
            color=colour,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            marker="o",
            markersize=4.5,
            markerfacecolor="white",
            label=f"{name}  {line[-1][1]:.4g}",
        )


def _fit_height(axes: Axes, curves: Mapping[str, Curve], names: Sequence[str]) -> None:
    """Leaves single spikes out of the height, so that they do not flatten the rest."""
    keys = [*names, *(f"validation/{name}" for name in names)]
    values = sorted(value for key in keys for _, value in _finite(curves.get(key, ())))
    if not values:
        return
    low, high = values[0], values[max(0, math.ceil(0.995 * len(values)) - 1)]
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    axes.set_ylim(low - margin, high + margin)


def _draw_small(axes: Axes, curve: Curve, key: str, *, last: bool) -> None:
    last_value = _draw_with_average(axes, curve, colour=COLOURS[0], noisy=key not in _NOISELESS)
    if last_value is not None:
        axes.set_title(f"{_SMALL_PANELS[key]}   {_short(last_value)}", loc="left", fontsize=9.5, color=INK)
    axes.margins(y=0.12)
    _style(axes)
    axes.tick_params(labelsize=8, labelbottom=last)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.locator_params(axis="y", nbins=4)
    if last:
        axes.set_xlabel("step", fontsize=9, color=INK)


def _style(axes: Axes) -> None:
    style_axes(axes)
    axes.locator_params(axis="x", integer=True)


def _short(value: float) -> str:
    return format_count(float(value)) if abs(value) >= 1000 else f"{value:.3g}"
