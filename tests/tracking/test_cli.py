"""`raydist runs` and `raydist artifacts` as a user calls them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raydist.cli.main import main
from raydist.tracking import server
from raydist.tracking.mlflow_runs import start_run
from raydist.tracking.mlflow_tracker import open_tracker
from tests.tracking.helpers import make_config


def track(output_dir: Path, name: str, *, num_steps: int, experiment: str = "raydist") -> str:
    config = make_config(output_dir, experiment=experiment).model_copy(update={"name": name})
    run_dir = output_dir / name
    handle = start_run(config, run_dir=str(run_dir))
    tracker = open_tracker(str(run_dir), system_metrics=False)
    for step in range(1, num_steps + 1):
        tracker.log_metrics({"loss": 5.0 - step, "tokens": 1000.0 * step, "loss/x": float("nan")}, step=step)
    (run_dir / "note.txt").write_text(name)
    tracker.log_artifact(str(run_dir / "note.txt"))
    tracker.close()
    handle.finish("FINISHED")
    return str(handle.run_id)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """Exit code, the JSON object that ends stdout, and stderr."""
    capsys.readouterr()
    code = main([*arguments, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def test_list_show_and_pull(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = track(output_dir, "first", num_steps=3)
    second = track(output_dir, "second", num_steps=2)
    other = track(output_dir, "other", num_steps=1, experiment="another")
    where = ["--output-dir", str(output_dir)]

    code, result, text = call(capsys, "runs", "list", *where)
    assert code == 0
    assert [run["run_id"] for run in result["runs"]] == [other, second, first]
    assert [(run["step"], run["tokens"], run["loss"]) for run in result["runs"]][2] == (3, 3000.0, 2.0)
    assert "finished" in text
    _, result, _ = call(capsys, "runs", "list", *where, "--experiment", "another")
    assert [run["name"] for run in result["runs"]] == ["other"]

    code, result, text = call(capsys, "runs", "show", "first", *where)
    assert (code, result["run_id"], result["metrics"]["loss"], result["metrics"]["loss/x"]) == (0, first, 2.0, "nan")
    assert result["params"]["data.seq_len"] == "8"
    assert "note.txt" in text

    for reference in (first, "first", str(output_dir / "first")):
        code, result, _ = call(capsys, "artifacts", "list", reference, *where)
        assert code == 0
        assert "note.txt" in [entry["name"] for entry in result["artifacts"]]
    target = output_dir / "out"
    code, result, _ = call(capsys, "artifacts", "pull", "first", "--to", str(target), "--name", "note.txt", *where)
    assert (code, result["files"]) == (0, [str(target / "note.txt")])
    assert (target / "note.txt").read_text() == "first"


def test_of_two_runs_with_one_name_the_newest_is_meant(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(output_dir, "twin", num_steps=1)
    (output_dir / "twin" / "mlflow.json").unlink()
    (output_dir / "twin" / "metrics.jsonl").unlink()
    newer = track(output_dir, "twin", num_steps=2)
    _, result, _ = call(capsys, "runs", "show", "twin", "--output-dir", str(output_dir))
    assert (result["run_id"], result["step"]) == (newer, 2)


def test_an_unknown_run_names_the_nearest(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(output_dir, "quickstart", num_steps=1)
    code, result, text = call(capsys, "runs", "show", "quikstart", "--output-dir", str(output_dir))
    assert code == 2
    assert result["error"] == "TrackingError"
    assert "quickstart" in result["expected"]
    assert "Traceback" not in text


def test_an_unknown_experiment_names_those_there_are(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(output_dir, "a", num_steps=1)
    code, result, _ = call(capsys, "runs", "list", "--output-dir", str(output_dir), "--experiment", "nope")
    assert (code, "raydist" in result["expected"]) == (2, True)


def test_looking_for_runs_makes_no_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = call(capsys, "runs", "list", "--output-dir", str(tmp_path / "nowhere"))
    assert (code, result["what"]) == (2, "no runs are tracked here")
    assert not (tmp_path / "nowhere").exists()


def test_a_server_that_is_away_takes_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound, not listening: refused
        code, result, text = call(capsys, "runs", "list", "--mlflow-uri", uri)
    assert (code, result["what"], result["where"]) == (2, "MLflow cannot be reached", uri)
    assert "refused" in result["found"]
    assert len(text.splitlines()) <= 8


def test_sync_of_a_directory_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = call(capsys, "runs", "sync", str(tmp_path))
    assert (code, result["error"]) == (2, "TrackingError")
    code, _, _ = call(capsys, "runs", "sync", str(tmp_path / "typo"))
    assert (code, (tmp_path / "typo").exists()) == (2, False)


def test_a_name_means_the_run_directory_whose_record_knows_the_server(
    output_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = output_dir / "elsewhere" / "m.db"
    database.parent.mkdir()
    (output_dir / "mlflow.db").rename(database)
    config = make_config(output_dir, mlflow_uri=f"sqlite:///{database}")
    run_id = start_run(config, run_dir=str(output_dir / "small")).run_id
    _, result, _ = call(capsys, "runs", "show", "small", "--output-dir", str(output_dir))
    assert (result["run_id"], result["uri"]) == (run_id, f"sqlite:///{database}")


def test_a_name_in_a_bucket_means_the_run_directory_there(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(output_dir / "cache"))
    bucket = f"memory://named-{output_dir.name}"
    uri = f"sqlite:///{output_dir}/mlflow.db"
    run_id = start_run(make_config(output_dir, mlflow_uri=uri), run_dir=f"{bucket}/small").run_id
    code, result, _ = call(capsys, "runs", "show", "small", "--output-dir", bucket)
    assert (code, result["run_id"], result["uri"]) == (0, run_id, uri)
    code, result, _ = call(capsys, "runs", "show", "other", "--output-dir", bucket)
    assert (code, result["what"]) == (2, "no run directory, and no MLflow to look in")


def test_a_name_that_waits_for_mlflow_says_where_it_lies(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server, "connect", lambda uri: (_ for _ in ()).throw(ConnectionError("away")))
        start_run(make_config(output_dir), run_dir=str(output_dir / "small"))
    code, result, _ = call(capsys, "runs", "show", "small", "--output-dir", str(output_dir))
    place = str(output_dir / "small")
    assert (code, result["where"], result["fix"]) == (2, place, f"raydist runs sync {place}")


def test_an_unknown_id_is_refused(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = call(capsys, "runs", "show", "0" * 32, "--output-dir", str(output_dir))
    assert (code, result["what"]) == (2, "the MLflow server refuses")


def test_a_target_that_cannot_be_written_is_no_outage(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(output_dir, "a", num_steps=1)
    (output_dir / "out").mkdir()
    (output_dir / "out" / "deep").write_text("a file where a folder should be")
    (output_dir / "a" / "x.txt").write_text("x")
    handle = start_run(make_config(output_dir), run_dir=str(output_dir / "a"))
    handle.log_artifact(str(output_dir / "a" / "x.txt"), folder="deep")
    where = ["--to", str(output_dir / "out"), "--output-dir", str(output_dir)]
    code, result, _ = call(capsys, "artifacts", "pull", "a", "--name", "deep", *where)
    assert (code, result["error"]) == (2, "TrackingError")
    assert "reached" not in result["what"]


QUIET = """
import sys
for name in ("ray", "torch", "transformers"):
    sys.modules[name] = None  # importing it fails
from raydist.cli.main import main
sys.exit(main(["artifacts", "pull", sys.argv[1], "--to", sys.argv[2], "--json"]))
"""

START = """
import sys
from pathlib import Path
from tests.tracking.test_cli import track
track(Path(sys.argv[1]), "fresh", num_steps=1)
"""


def test_quiet_from_the_first_table_on_and_pull_without_ray_or_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}

    def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    started = python(START, str(tmp_path))
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    pulled = python(QUIET, str(tmp_path / "fresh"), str(tmp_path / "out"))
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "out" / "note.txt").read_text() == "fresh"
    assert pulled.stderr.count("\n") == 1
