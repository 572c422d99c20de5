"""Small sweeps on real data, shared by the tests of the sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raydist.config.sweep import Sweep, load_sweep
from raydist.evaluation.sweep_records import TrialRecord
from raydist.runtime.sweep_view import SweepView
from tests.training.cases import recipe_values

METRIC = "validation/loss/ntp"


class Watcher(SweepView):
    """Remembers what happened."""

    def __init__(self) -> None:
        self.at_once = 0
        self.most_running = 0
        self.ended: list[str] = []
        self.failures: list[str] = []

    def on_plan(self, *, at_once: int, text: str) -> None:
        self.at_once = at_once

    def on_change(self, records: Sequence[TrialRecord]) -> None:
        self.most_running = max(self.most_running, sum(record.state == "running" for record in records))

    def on_end(self, record: TrialRecord, *, failure: str) -> None:
        self.ended.append(record.name)
        self.failures.append(failure)


def write_sweep(
    folder: Path, dataset: str, *, space: Mapping[str, Any], recipe: Mapping[str, Any] | None = None, **sections: Any
) -> str:
    """Writes a recipe and a sweep over it; returns the sweep's path."""
    values = recipe_values(dataset, folder / "out", **(recipe or {}))
    values["name"] = None
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    sweep = {
        "name": "rates",
        "recipe": str(folder / "recipe.yaml"),
        "space": dict(space),
        "metric": METRIC,
        "budget": {"num_steps": 8},
        "overrides": {"training.validate_every_steps": 2, "checkpoint.every_steps": 4},
        **sections,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return str(path)


def make_sweep(folder: Path, dataset: str, **arguments: Any) -> Sweep:
    return load_sweep(write_sweep(folder, dataset, **arguments))
