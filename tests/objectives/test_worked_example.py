"""The page docs/new_objective.md: its file, its recipe and its test, run as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import raydist.objectives
from raydist.config.load import merge, resolve
from raydist.config.registries import OBJECTIVES
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from raydist.tracking.jsonl import read_curve
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from tests.training.cases import write_dataset

PAGE = (Path(__file__).parents[2] / "docs" / "new_objective.md").read_text()
FILE, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(RECIPE,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def package_with_bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The objectives package with one more file in it, as if the user had put it there."""
    monkeypatch.setattr(OBJECTIVES, "_classes", dict(OBJECTIVES.classes()))
    monkeypatch.setattr(OBJECTIVES, "_discovered", False)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "bert.py").write_text(FILE)
    monkeypatch.setattr(raydist.objectives, "__path__", [*raydist.objectives.__path__, str(tmp_path / "package")])
    monkeypatch.delitem(sys.modules, "raydist.objectives.bert", raising=False)


def test_it_is_short() -> None:
    code = [line for line in FILE.splitlines() if line.strip()]
    assert len(code) < 60


def test_it_is_found_trained_and_sampled(package_with_bert: None, tmp_path: Path) -> None:
    assert "bert" in OBJECTIVES.describe()
    dataset = write_dataset(tmp_path)
    values = yaml.safe_load(RECIPE)
    here = {
        "output_dir": str(tmp_path / "runs"),
        "data": {"train": f"{dataset}/train", "validation": f"{dataset}/validation", "cache_dir": str(tmp_path / "c")},
        "tracking": {"mlflow_uri": "none", "system_metrics": False},
    }
    recipe = resolve(merge(values, here), path="bert.yaml")
    run_dir = prepare_run_dir(recipe, resume=False)
    run_attempt(recipe, run_dir=run_dir)
    losses = [value for _, value in read_curve(f"{run_dir}/metrics.jsonl")["loss"]]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert (Path(run_dir) / "pictures" / "samples.json").exists()


def test_its_test_passes(package_with_bert: None) -> None:
    config = OBJECTIVES.classes()["bert"]
    names = {"BertConfig": config, "Rows": Rows, "RowRng": RowRng, "TokenIds": TokenIds, "torch": torch}
    exec(TEST, names)  # the block of the page
    names["test_the_loss_is_the_mean_over_masked_tokens"]()
