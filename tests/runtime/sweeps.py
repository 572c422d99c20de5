"""Small sweeps on real data, shared by the tests of the sweep."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.util import placement_group_table
from ray.util.state import list_actors

from raydist.checkpoint.layout import newest_complete
from raydist.config.sweep import Sweep, load_sweep
from raydist.evaluation.sweep_records import TrialRecord
from raydist.runtime.sweep_view import SweepView
from tests.training.cases import recipe_values

METRIC = "validation/loss/ntp"
RATE = "training.optimizer.learning_rate"
_OF_RAY_ITSELF = {"_AutoscalingCoordinatorActor"}


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


# --- what a cluster holds ---


def actors(*, alive: bool = True) -> dict[str, str]:
    """Actor id -> class name; of those that live, or of all that ever did."""
    here = ray.get_runtime_context().gcs_address  # other clusters may run on this machine
    filters = [("state", "=", "ALIVE")] if alive else []
    found = list_actors(address=here, filters=filters, limit=10_000)
    return {actor.actor_id: actor.class_name for actor in found if actor.class_name not in _OF_RAY_ITSELF}


def assert_nothing_left(*, others: set[str]) -> None:
    """No placement group, no actor of a trial, all CPUs free."""
    for _ in range(150):
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        left = [name for actor, name in actors().items() if actor not in others]
        free = ray.available_resources().get("CPU", 0.0) == ray.cluster_resources()["CPU"]
        if not groups and not left and free:
            return
        time.sleep(0.2)
    pytest.fail(f"left behind: {groups}, {left}, CPUs free: {free}")


# --- what a sweep's directory holds ---


def lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of ``trials.jsonl``."""
    path = folder / "trials.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def saved(folder: Path) -> list[str]:
    """The running trials that have a checkpoint, and steps left to go on with."""
    states = {line["name"]: line["state"] for line in lines(folder)}
    running = [name for name, state in states.items() if state == "running"]
    return [name for name in running if 0 < _saved_step(folder / name) < _num_steps(folder / name)]


def _saved_step(trial: Path) -> int:
    newest = newest_complete(str(trial))
    return 0 if newest is None else newest.step


def _num_steps(trial: Path) -> int:
    return int(yaml.safe_load((trial / "config.yaml").read_text())["training"]["num_steps"])


def is_in_the_middle(folder: Path) -> bool:
    """A trial is done, and one that runs has a checkpoint."""
    return "finished" in {line["state"] for line in lines(folder)} and bool(saved(folder))


def attempts(folder: Path, name: str) -> set[int]:
    """The attempts that wrote a trial's metrics."""
    written = (folder / name / "metrics.jsonl").read_text().splitlines()
    return {json.loads(line)["attempt"] for line in written}


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 300.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
