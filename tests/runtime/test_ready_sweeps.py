"""Two of the sweeps that come along, as a user types them: one that trains, one that samples, each on a Ray of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from raydist.tracking.find import list_runs
from tests.servers.processes import wait_until
from tests.training.cases import quiet_environment

pytestmark = pytest.mark.ray

_MARK = "RAYDIST_TEST_MARK"
_TIMEOUT_S = 300  # the goal of benchmarks/ready_sweeps.py


def marked(mark: str) -> list[str]:
    """Names of the processes that a command has started, and theirs: they inherit its environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                found.append(process.name())
    return found


def raydist(*words: str) -> dict[str, Any]:
    """Runs a verb in a process of its own, which must leave no Ray behind; returns the object of its last line."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "raydist.cli.main", *words, "--json"]
    done = subprocess.run(
        command,
        env={**quiet_environment(), _MARK: mark},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wait_until(lambda: marked(mark) == [], timeout_s=60, what="its processes end")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def assert_tracked(result: dict[str, Any], experiment: str) -> None:
    """One ended parent and one ended child for each trial."""
    runs = {run.name: run for run in list_runs(result["mlflow_uri"], experiment=experiment)}
    assert set(runs) == {result["sweep"], *(trial["name"] for trial in result["trials"])}
    assert {run.status for run in runs.values()} <= {"FINISHED", "KILLED"}
    parent = runs[result["sweep"]]
    assert (parent.run_id, parent.status) == (result["mlflow_run_id"], "FINISHED")
    for trial in result["trials"]:
        assert runs[trial["name"]].tags["mlflow.parentRunId"] == parent.run_id


def test_schedules_and_paths_stop_early_and_end_in_a_ranking(dataset: str, tmp_path: Path) -> None:
    here = (f"data.train={dataset}/train", f"data.validation={dataset}/validation", f"output_dir={tmp_path}")
    result = raydist("sweep", "sweeps/schedulers_and_paths.yaml", "+debug", *here)

    trials = result["trials"]
    assert len(trials) >= 8
    assert {trial["state"] for trial in trials} == {"finished", "stopped"}, "early stopping stopped nothing"
    chosen = [trial["parameters"] for trial in trials]
    assert len({json.dumps(values.get("objective.path.schedule")) for values in chosen} - {"null"}) >= 3
    assert len({values["objective.path"]["name"] for values in chosen}) >= 2
    finished = [trial for trial in trials if trial["state"] == "finished"]
    bounds = [trial["metrics"]["validation/bound_nats_per_token"] for trial in finished]
    assert bounds == sorted(bounds)
    assert result["best"] == trials[0]["name"]

    folder = Path(result["sweep_dir"])
    names = {"metric_against_step.png", "parallel_coordinates.png", "marginals.png", "sweep.html"}
    assert {path.name for path in (folder / "pictures").iterdir()} == names
    assert [row["trial"] for row in json.loads((folder / "ranking.json").read_text())] == [t["name"] for t in trials]
    assert json.loads((folder / "driver.json").read_text())["ended"]
    assert not list(folder.rglob("*.partial-*"))
    assert_tracked(result, "debug-cpu")


def test_samplers_are_compared_and_a_resume_has_nothing_left_to_do(dataset: str, tmp_path: Path) -> None:
    here = (f"data.train={dataset}/train", f"data.validation={dataset}/validation", f"output_dir={tmp_path}")
    raydist("train", "jobs/recipes/debug_cpu/set_block.yaml", "--no-ray", "training.num_steps=20", *here)
    sweep = ("sweep", "sweeps/sampler_pareto.yaml", "+debug", f"continuation.data={dataset}/validation")
    sweep = (*sweep, f"checkpoint={tmp_path}/debug-set-block", f"output_dir={tmp_path}")
    result = raydist(*sweep)
    trials = {trial["name"]: trial for trial in result["trials"]}
    assert len(trials) == 8
    assert {trial["state"] for trial in trials.values()} == {"finished"}
    for trial in trials.values():
        assert 0 <= trial["metrics"]["accuracy"] <= 1
    keys = ("sampling.sampler.block_size", "sampling.sampler.unmasking.gamma")
    forwards = {
        tuple(trial["parameters"][key] for key in keys): trial["metrics"]["tokens_per_forward"]
        for trial in trials.values()
    }
    for block_size in (4, 8):
        row = [forwards[block_size, gamma] for gamma in (0.1, 0.4, 1.6, 6.4)]
        assert row == sorted(row), "a larger gamma never takes more forwards"
        assert row[-1] <= block_size
    assert "pareto_front.png" in {path.name for path in (Path(result["sweep_dir"]) / "pictures").iterdir()}
    assert_tracked(result, "raydist")

    again = raydist(*sweep, "--resume")
    assert {trial["name"]: trial["metrics"] for trial in again["trials"]} == {
        name: trial["metrics"] for name, trial in trials.items()
    }
    assert again["mlflow_run_id"] == result["mlflow_run_id"]
