"""The sweep that docs/sweeps.md shows: its numbers are those of the results file, and nobody types them."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from raydist.config.sweep import load_sweep

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "pictures" / "sweeps" / "results.json"


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_gallery", ROOT / "jobs" / "sweep_gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_training(folder: Path) -> None:
    """A finished sweep of two paths, the way `raydist sweep` leaves it."""
    spec = {"budget": {"num_steps": 40}, "scheduler": {"grace_steps": 10, "reduction_factor": 3}}
    bound = "validation/bound_nats_per_token"
    mask = {
        "objective.path": {"name": "mixture", "source": {"name": "mask"}},
        "objective.path.schedule": {"name": "polynomial", "power": 2},
    }
    metric = {"objective.path": {"name": "metric"}, "objective.path.beta.c": 0.5}
    trials = [("t-000", mask, "finished", 40, [(10, 3.0), (40, 2.0)]), ("t-001", metric, "stopped", 10, [(10, 5.0)])]
    ranking = []
    for name, parameters, state, step, curve in trials:
        (folder / name).mkdir(parents=True)
        lines = [json.dumps({"step": at, "time": 0.0, "attempt": 1, bound: value}) for at, value in curve]
        (folder / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        ranking.append({"trial": name, "parameters": parameters, "state": state, "step": step, bound: curve[-1][1]})
    (folder / "t-000" / "export").mkdir()
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, folder / "t-000" / "export" / "model.safetensors")
    save_file({"c": torch.zeros(2, 2)}, folder / "t-000" / "export" / "raydist_extras.safetensors")
    (folder / "sweep.yaml").write_text(yaml.safe_dump(spec))
    (folder / "ranking.json").write_text(json.dumps(ranking))
    (folder / "best.json").write_text(json.dumps({"trial": "t-000", "run_dir": "/somewhere/else"}))


def write_sampling(folder: Path) -> None:
    folder.mkdir()
    settings = [(8, 0.3, 0.6, 8.0), (64, 0.3, 0.7, 1.0), (64, 1.0, 0.5, 1.0)]
    entries = [
        {
            "trial": f"s-{index:03d}",
            "parameters": {"sampling.sampler.num_steps": steps, "sampling.sampler.temperature": temperature},
            "state": "finished",
            "accuracy": accuracy,
            "tokens_per_forward": speed,
        }
        for index, (steps, temperature, accuracy, speed) in enumerate(settings)
    ]
    (folder / "ranking.json").write_text(json.dumps(entries))


@pytest.fixture
def results(gallery: Any, tmp_path: Path) -> dict[str, Any]:
    write_training(tmp_path / "training")
    write_sampling(tmp_path / "sampling")
    return {
        "versions": gallery.versions(),
        "training": {**gallery.results_of_training(tmp_path / "training"), "wall_s": 100.0},
        "sampling": {**gallery.results_of_samplers(tmp_path / "sampling"), "wall_s": 10.0},
    }


def test_results_are_what_the_sweeps_left(results: dict[str, Any]) -> None:
    training = results["training"]
    assert (training["num_parameters"], training["steps_run"], training["steps_of_all"]) == (26, 50, 80)
    first, second = training["trials"]
    assert (first["path"], first["setting"], first["state"]) == ("mask mixture", "polynomial 2", "finished")
    assert (second["path"], second["setting"], second["state"]) == ("metric", "c = 0.5", "stopped")
    assert first["bits"] == pytest.approx(2.0 / math.log(2), abs=1e-3)
    assert first["bits_at_rung"] == pytest.approx(3.0 / math.log(2), abs=1e-3)
    assert "/somewhere" not in json.dumps(results), "no path of a machine"
    assert [trial["on_front"] for trial in results["sampling"]["trials"]] == [True, True, False]


def test_the_section_is_made_of_the_results(gallery: Any, results: dict[str, Any]) -> None:
    text = " ".join(gallery.render(results, pictures="pictures/sweeps").split())
    assert "mask mixture path, polynomial 2: 2.89 bits per byte" in text
    assert "4.33 to 4.33 (mask mixture); 7.21 to 7.21 (metric)" in text
    assert "62% of the steps" in text
    assert "| 64 | 0.3 | 0.700 | 1.00 |" in text
    changed = json.loads(json.dumps(results).replace("2.8854", "1.2345"))
    assert changed != results
    assert "1.23 bits per byte" in " ".join(gallery.render(changed, pictures="pictures/sweeps").split())
    assert "Above 8 bits" not in text
    assert "Above 8 bits" in gallery.render(json.loads(json.dumps(results).replace("7.2135", "9.5")), pictures="x")
    page = f"before\n{gallery.BEGIN}\nold 9.99\n{gallery.END}\nafter\n"
    assert gallery.with_section(page, "new") == f"before\n{gallery.BEGIN}\n\nnew\n\n{gallery.END}\nafter\n"


def test_the_page_says_what_the_results_say(gallery: Any) -> None:
    """The whole section, word for word; before the sweep was run it is empty."""
    page = (ROOT / "docs" / "sweeps.md").read_text()
    shown = page.split(gallery.BEGIN)[1].split(gallery.END)[0].strip("\n")
    expected = gallery.render(json.loads(RESULTS.read_text()), pictures="pictures/sweeps") if RESULTS.exists() else ""
    assert shown == expected
    for picture in re.findall(r"\]\(([^)]+)\)", shown):
        assert (ROOT / "docs" / picture).is_file()


def test_the_sweeps_that_it_runs_are_valid() -> None:
    sweep = load_sweep(str(ROOT / "sweeps" / "schedulers_and_paths.yaml"), overlay="gallery")
    sweep.validate_trials()
    trials = [sweep.resolve_trial(trial).config for trial in sweep.grid()]
    assert len(trials) >= 12
    assert {trial.objective.path.name for trial in trials} == {"mixture", "metric", "three_way"}
    load_sweep(str(ROOT / "sweeps" / "flow_sampler.yaml"), ["checkpoint=somewhere"]).validate_trials()
