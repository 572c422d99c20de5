"""``raydist status`` where there is no cluster any more: the run directory says it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from raydist.cli.main import main
from raydist.core import storage
from raydist.runtime.jobs import Job, JobsApi
from raydist.runtime.status import STATUS, RunStatus

RUNNING = RunStatus(
    name="x", run_dir="runs/x", state="running", step=40, num_steps=100, attempt=2, world_size=4, tokens=40960.0,
    loss=2.25, tokens_per_s=1234.0, mfu=0.41, checkpoint_step=30, upload_s=2.0, saving_step=40, job_id="raydist-x",
    dashboard_url="http://127.0.0.1:8265", mlflow_uri="http://m:5000", mlflow_run_id="abc",
)  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # nobody listens there
    return tmp_path / "runs"


def write(runs: Path, status: RunStatus) -> None:
    storage.write_json(str(runs / status.name / STATUS), dataclasses.asdict(status))


def told(capsys: pytest.CaptureFixture[str], *words: str, exit_code: int = 0) -> tuple[dict[str, Any], str]:
    assert main(["status", *words, "--json"]) == exit_code
    out, err = capsys.readouterr()
    return json.loads(out.strip().splitlines()[-1]), err


def test_everything_that_is_known_is_shown(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    write(runs, dataclasses.replace(RUNNING, updated_at=now - 2, saving_since=now - 9))
    for name in ("x", str(runs / "x")):
        answer, seen = told(capsys, name)
        assert answer["status"]["step"] == 40
        assert 2 <= answer["heartbeat_age_s"] < 60
        assert not answer["is_stale"]
    shown = {line[:21].strip(): line[21:] for line in seen.splitlines()}
    assert shown["step"] == "40 of 100"
    assert shown["tokens"] == "41k"
    assert shown["loss"] == "2.25"
    assert shown["tokens/s"] == "1.23k"
    assert shown["MFU"] == "41.0 %"
    assert shown["workers"] == "4, attempt 2"
    assert shown["complete checkpoint"].startswith("step 30, stored in 2.00s; step 40 on its way for")
    assert shown["Ray dashboard"] == "http://127.0.0.1:8265"
    assert shown["MLflow run"] == "abc in http://m:5000"


def test_a_dead_driver_is_called_silent(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(runs, dataclasses.replace(RUNNING, updated_at=time.time() - 3600))
    answer, seen = told(capsys, "x", "--watch")  # a dead run is not watched for ever
    assert answer["is_stale"]
    assert "its driver is silent" in seen
    assert "1h00m ago" in seen
    assert "raydist submit RECIPE name=x --cluster FILE --resume" in seen


def test_all_runs_of_a_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer, seen = told(capsys)
    assert answer == {"runs": []}
    write(runs, dataclasses.replace(RUNNING, updated_at=time.time()))
    write(runs, dataclasses.replace(RUNNING, name="y", state="failed", message="DataError: x", updated_at=1.0))
    (runs / "no-run").mkdir()
    answer, seen = told(capsys)
    assert [run["status"]["name"] for run in answer["runs"]] == ["x", "y"]
    assert "40/100" in seen
    assert "failed" in seen


def test_a_name_that_nobody_has(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer, seen = told(capsys, "nobody", exit_code=2)
    assert answer["error"] == "ClusterError"
    assert "--output-dir runs" in seen
    assert "does not answer" in seen


def test_a_directory_of_the_same_name_is_not_the_jobs(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    write(runs, dataclasses.replace(RUNNING, run_dir=str(runs / "x"), step=1, updated_at=now))
    theirs = dataclasses.replace(RUNNING, run_dir=str(runs.parent / "shared" / "x"), step=77, updated_at=now)
    write(runs.parent / "shared", theirs)
    job = Job("raydist-x", "RUNNING", None, "x", theirs.run_dir, None, 1, 3.0, None, None)
    monkeypatch.setattr(JobsApi, "__init__", lambda self, address: None)
    monkeypatch.setattr(JobsApi, "find", lambda self, name: job)
    answer, _ = told(capsys, "x", "--address", "http://127.0.0.1:1")
    assert (answer["status"]["run_dir"], answer["status"]["step"]) == (theirs.run_dir, 77)
    (runs.parent / "shared" / "x" / STATUS).unlink()
    answer, seen = told(capsys, "x", "--address", "http://127.0.0.1:1")
    assert answer["status"] is None
    assert f"{theirs.run_dir}: no status there yet" in seen


def test_a_damaged_status_is_one_screen(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage.write_json(str(runs / "x" / STATUS), {**dataclasses.asdict(RUNNING), "mfu": "x"})
    answer, seen = told(capsys, "x", exit_code=2)
    assert answer["error"] == "RaydistError"
    assert "mfu" in seen


def test_a_cluster_that_is_gone_does_not_hide_the_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(runs, dataclasses.replace(RUNNING, updated_at=time.time()))
    answer, seen = told(capsys, "x", "--address", "http://127.0.0.1:1")
    assert answer["job"] is None
    assert answer["status"]["step"] == 40
    assert "this is what the run directory says" in seen
