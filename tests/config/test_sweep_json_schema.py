"""The editors' schema of sweep files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raydist.config.load import load_recipe
from raydist.config.sweep_json_schema import sweep_json_schema

SWEEPS = sorted(Path("sweeps").glob("*.yaml"))
GOOD: dict[str, Any] = {
    "recipe": "recipe.yaml",
    "space": {"training.optimizer.learning_rate": [1e-3, 1e-2]},
    "metric": "validation/loss/ntp",
}
BAD = {
    "unknown key": {"serach": {"name": "grid"}},
    "unknown searcher": {"search": {"name": "gird"}},
    "one end": {"space": {"seed": {"uniform": [1.0]}}},
    "two kinds": {"space": {"seed": {"uniform": [1.0, 2.0], "choice": [1]}}},
    "no list": {"space": {"seed": 3}},
    "steps": {"budget": {"num_steps": "many"}},
    "metric": {"metric": {"name": "validation/loss/ntp", "mode": "lowest"}},
    "in an overlay": {"overlays": {"debug": {"bugdet": {}}}},
}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = sweep_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_it_is_current() -> None:
    written = json.loads(Path("sweeps/sweep.schema.json").read_text())
    assert written == sweep_json_schema(), "run: raydist config schema --sweep > sweeps/sweep.schema.json"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_it_accepts_every_sweep_and_editors_find_it(validator: Any, path: Path) -> None:
    text = path.read_text()
    assert list(validator.iter_errors(yaml.safe_load(text))) == []
    assert "# yaml-language-server: $schema=sweep.schema.json" in text


def test_it_accepts_the_example_of_the_readme(validator: Any) -> None:
    text = Path("sweeps/README.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert list(validator.iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_it_marks_what_does_not_load(validator: Any, change: dict[str, Any]) -> None:
    assert validator.is_valid(GOOD)
    assert not validator.is_valid({**GOOD, **change})


def test_it_offers_the_keys_of_a_recipe_with_their_descriptions() -> None:
    offered = sweep_json_schema()["$defs"]["Space"]["properties"]
    config = load_recipe("jobs/recipes/debug_cpu/discrete_flow_metric.yaml").config.model_dump(mode="json")

    def keys(values: Any, prefix: str = "") -> list[str]:
        if not isinstance(values, dict):
            return [prefix]
        return [key for name, value in values.items() for key in keys(value, f"{prefix}.{name}" if prefix else name)]

    wanted = {key for key in keys(config) if key.split(".")[0] in ("model", "objective", "training", "scaling")}
    assert {"objective.path.beta.c", "training.optimizer.learning_rate"} <= wanted <= set(offered)
    assert "inverse temperature" in offered["objective.path.beta"]["description"]
    assert not {"name", "output_dir", "tracking.mlflow_uri"} & set(offered), "the sweep sets these itself"
