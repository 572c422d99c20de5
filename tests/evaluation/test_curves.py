"""The average behind the picture, and a picture that holds what it should."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydist.evaluation.curves import draw_curves, smoothed
from raydist.evaluation.figures import COLOURS

steps_and_values = st.lists(
    st.tuples(st.integers(0, 500), st.floats(-100, 100)), max_size=20, unique_by=lambda point: point[0]
).map(sorted)


@given(curve=steps_and_values, half_life_steps=st.floats(0.5, 50))
def test_smoothed_is_the_weighted_mean_it_says(curve: list[tuple[int, float]], half_life_steps: float) -> None:
    result = smoothed(curve, half_life_steps=half_life_steps)
    steps = np.array([step for step, _ in curve], dtype=float)
    values = np.array([value for _, value in curve], dtype=float)
    assert [step for step, _ in result] == [step for step, _ in curve]
    for step, mean in result:
        weights = 2.0 ** (-np.abs(steps - step) / half_life_steps)
        assert mean == pytest.approx(float(weights @ values / weights.sum()), abs=1e-9, rel=1e-9)


def test_non_finite_values_are_left_out() -> None:
    curve = [(1, 2.0), (2, math.nan), (3, math.inf), (4, 2.0)]
    assert smoothed(curve, half_life_steps=1.0) == [(1, 2.0), (4, 2.0)]


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def has_colour(image: np.ndarray, colour: str) -> bool:
    from matplotlib.colors import to_rgb

    return bool((np.abs(image - np.array(to_rgb(colour))).max(axis=-1) < 0.02).sum() > 50)


def test_each_loss_is_drawn_in_its_colour(tmp_path: Path) -> None:
    line = [(step, 5.0 - step / 100) for step in range(100)]
    one, two = {"loss": line}, {"loss": line, "loss/matp": [(step, value + 1) for step, value in line]}
    draw_curves(one, str(tmp_path / "one.png"), "one")
    draw_curves(two, str(tmp_path / "two.png"), "two")
    blue, red = COLOURS[:2]
    assert has_colour(pixels(tmp_path / "one.png"), blue)
    assert not has_colour(pixels(tmp_path / "one.png"), red)
    assert has_colour(pixels(tmp_path / "two.png"), red)


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"loss": [(1, 3.0)]},
        {"loss": [(1, math.nan)]},
        {"loss": [(1, 3.0), (2, math.nan)], "grad_norm": [(1, math.inf)], "tokens_per_s": [(1, 1e5)]},
        {"learning_rate": [(1, 1e-3), (2, 1e-4)]},
        {"loss": [(step, 1.0) for step in range(50)], "validation/loss": [(49, 1.0)]},
    ],
)
def test_poor_runs_have_a_picture_too(tmp_path: Path, curves: dict[str, list[tuple[int, float]]]) -> None:
    draw_curves(curves, str(tmp_path / "curves.png"), "a run")
    assert pixels(tmp_path / "curves.png").shape == (676, 1430, 3)


def test_no_global_figure_is_left(tmp_path: Path) -> None:
    from matplotlib import _pylab_helpers

    draw_curves({"loss": [(1, 1.0)]}, str(tmp_path / "x.png"), "x")
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []
