"""The table of (run exists, same configuration, --resume) and its outcomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydist.config.load import Recipe, read_resolved, resolve
from raydist.core.errors import ResumeError
from raydist.training.run_dir import prepare_run_dir, record_config
from tests.training.cases import recipe_of, recipe_values


def test_fresh_name_without_resume(tmp_path: Path) -> None:
    recipe = recipe_of("data", tmp_path)
    run_dir = prepare_run_dir(recipe, resume=False)
    assert read_resolved(f"{run_dir}/config.yaml").config == recipe.config


def test_fresh_name_with_resume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no such run"):
        prepare_run_dir(recipe_of("data", tmp_path), resume=True)
    assert list(tmp_path.iterdir()) == []


def test_name_in_use_without_resume_is_refused(tmp_path: Path) -> None:
    prepare_run_dir(recipe_of("data", tmp_path), resume=False)
    with pytest.raises(ResumeError, match="name is in use") as caught:
        prepare_run_dir(recipe_of("data", tmp_path), resume=False)
    assert "--resume" in (caught.value.fix or "")
    assert "name=run-2" in (caught.value.fix or "")


def test_resume_takes_allowed_changes(tmp_path: Path) -> None:
    prepare_run_dir(recipe_of("data", tmp_path), resume=False)
    changed = recipe_of("data", tmp_path, **{"scaling.num_workers": 2, "checkpoint.keep": 5})
    run_dir = prepare_run_dir(changed, resume=True)
    record_config(changed, run_dir)
    assert read_resolved(f"{run_dir}/config.yaml").config.checkpoint.keep == 5


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_resume_refuses_what_decides_the_result_and_names_it(tmp_path: Path, place: str) -> None:
    root = str(tmp_path) if place == "folder" else f"memory://run-dirs-{tmp_path.name}"

    def recipe(**changes: object) -> Recipe:
        values = {**recipe_values("data", tmp_path, **changes), "output_dir": root}
        return resolve(values, path="case.yaml")

    prepare_run_dir(recipe(), resume=False)
    changed = recipe(**{"seed": 1, "training.optimizer.learning_rate": 0.5})
    with pytest.raises(ResumeError, match="differs") as caught:
        prepare_run_dir(changed, resume=True)
    assert caught.value.where == "seed, training.optimizer.learning_rate"
