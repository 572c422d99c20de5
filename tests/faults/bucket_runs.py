"""Short runs in a bucket, trained in this process, and what must be true of them after a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydist.config.load import Recipe, resolve
from raydist.core import storage
from raydist.tracking.jsonl import read_curve
from tests.training.cases import recipe_values

SHORT_RUN = {
    "training.num_steps": 12,
    "training.validate_every_steps": "null",
    "checkpoint.every_steps": 4,
    "model.overrides.num_layers": 1,
}


def recipe_in(bucket: str, dataset: str, tmp_path: Path, **changes: Any) -> Recipe:
    """The short run in a bucket."""
    values = {**recipe_values(dataset, tmp_path, **{**SHORT_RUN, **changes}), "output_dir": f"{bucket}/runs"}
    return resolve(values, path="case.yaml")


def assert_same_curve(run_dir: str, whole: dict[str, Any]) -> None:
    """The loss is that of the uninterrupted run, bit for bit."""
    assert read_curve(f"{run_dir}/metrics.jsonl")["loss"] == whole["loss"]


def assert_nothing_left(tmp_path: Path, run_dir: str) -> None:
    """No temporary file on this machine, no half of an object in the bucket."""
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []
    assert not [name for name in storage.list_files(run_dir) if "partial" in name or "deleted" in name]
