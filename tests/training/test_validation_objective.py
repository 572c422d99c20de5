"""Validation by another objective than the one that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raydist.core.errors import ConfigError
from raydist.tracking.jsonl import read_curve
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from tests.training.cases import recipe_of

ONE_STILL_STEP = {
    "training.num_steps": 1,
    "training.validate_every_steps": 1,
    "training.optimizer.learning_rate": "1.0e-30",
}


def validated_by(dataset: str, folder: Path, **changes: Any) -> dict[str, list[tuple[int, float]]]:
    recipe = recipe_of(dataset, folder, **{**ONE_STILL_STEP, **changes})
    run_dir = prepare_run_dir(recipe, resume=False)
    run_attempt(recipe, run_dir=run_dir)
    curves = read_curve(f"{run_dir}/metrics.jsonl")
    return {name: curve for name, curve in curves.items() if name.startswith("validation/")}


def test_it_measures_as_if_it_trained(dataset: str, tmp_path: Path) -> None:
    """One step whose learning rate is nothing leaves the initial weights, so that both runs measure the same model."""
    fours = "{name: set_block, block_size_min: 4, block_size_max: 4}"
    own = validated_by(dataset, tmp_path / "own", **{"objective.block_size_min": 4, "objective.block_size_max": 4})
    other = validated_by(dataset, tmp_path / "other", **{"training.validation_objective": fours})
    plain = validated_by(dataset, tmp_path / "plain")
    assert set(own) >= {"validation/loss", "validation/loss/ntp", "validation/loss/matp"}
    assert other == own
    assert plain["validation/loss/matp"] != own["validation/loss/matp"]
    assert plain["validation/loss/ntp"] == own["validation/loss/ntp"]


def test_one_that_the_model_was_not_built_for_is_refused(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained without what this objective needs") as caught:
        validated_by(dataset, tmp_path, **{"training.validation_objective": "{name: resample, window: 3}"})
    assert caught.value.where == "training.validation_objective"
