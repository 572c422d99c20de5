"""`make cluster-demo`, as it is typed: Ray nodes, S3 and MLflow servers, a node killed in the middle of the quickstart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from raydist.tracking.jsonl import read_curve
from tests.faults.harness import assert_one_finished_run

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.mlflow_server]


def processes_that_name(text: str) -> list[int]:
    """Processes whose command line or environment names a folder; those of the demonstration all do."""
    found = []
    for process in psutil.process_iter():
        try:
            named = text in " ".join(process.cmdline()) or text in " ".join(process.environ().values())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if named and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def test_the_demonstration(tmp_path: Path, record_fault: Callable[..., None]) -> None:
    folder = tmp_path / "demo"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))
    }
    done = subprocess.run(
        [sys.executable, "jobs/cluster_demo.py", "--folder", str(folder), "--num-steps", "180"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    facts = json.loads((folder / "facts.json").read_text())
    assert (facts["state"], facts["step"], facts["attempts"]) == ("finished", 180, 2)
    assert 0 < facts["went_on_from_step"] <= facts["killed_at_step"] < 180
    assert (folder / "pulled" / "model" / "model.safetensors").stat().st_size > 1_000_000
    assert "tokens per forward" in done.stdout
    assert {"model", "pictures"} <= {path.name for path in (folder / "pulled").iterdir()}
    curve = read_curve(str(folder / "pulled" / "metrics.jsonl"))["loss"]
    assert curve[-1][0] == 180
    uri = f"sqlite:///{folder}/mlflow.db"
    assert_one_finished_run("cluster-demo", uri=uri, curve=curve, experiment="quickstart")
    assert processes_that_name(str(folder)) == []
    record_fault(
        "a node of a submitted job is killed (data, checkpoints and artifacts on S3, MLflow server)",
        "finished on a new node; the model was pulled, hash-verified",
        steps_lost=facts["killed_at_step"] - facts["went_on_from_step"],
        recovery_s=facts["recovery_s"],
    )
