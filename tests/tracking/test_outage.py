"""A real server that freezes, dies and comes back: training does not notice, and nothing is lost."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from raydist.core.errors import TrackingError
from raydist.tracking import jsonl, server
from raydist.tracking.find import find_run
from raydist.tracking.mlflow_runs import start_run, sync_run
from raydist.tracking.mlflow_tracker import open_tracker
from raydist.tracking.pull import pull
from tests.servers.mlflow_server import MlflowServer
from tests.tracking.helpers import history, make_config

pytestmark = pytest.mark.mlflow_server


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="raydist")
    logging.getLogger("raydist").propagate = True
    return caplog


def test_a_frozen_server(tmp_path: Path, mlflow_server: MlflowServer, warnings: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "small"
    handle = start_run(make_config(tmp_path, mlflow_uri=mlflow_server.url), run_dir=str(run_dir))
    tracker = open_tracker(str(run_dir), system_metrics=False)
    tracker.log_metrics({"loss": 0.0}, step=0)
    assert tracker.flush()

    mlflow_server.pause()
    try:
        for step in range(1, 201):
            tracker.log_metrics({"loss": step / 2}, step=step)
        assert len(jsonl.read_curve(str(run_dir / "metrics.jsonl"))["loss"]) == 201
        assert not tracker.flush(timeout_s=20.0)
    finally:
        mlflow_server.resume()
    assert tracker.flush()
    tracker.close()
    assert handle.finish("FINISHED")
    run = find_run(str(run_dir))
    assert history(run.uri, run.run_id, "loss") == [(step, step / 2) for step in range(201)]
    texts = [record.getMessage() for record in warnings.records]
    assert len([text for text in texts if "away" in text]) == 1
    assert len([text for text in texts if "back" in text]) == 1


def test_a_server_that_is_down_from_start_to_end(
    tmp_path: Path, mlflow_server: MlflowServer, warnings: pytest.LogCaptureFixture
) -> None:
    """Two attempts and the end of the run fall into the outage; one sync replays all of it."""
    run_dir = tmp_path / "small"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(os.urandom(1000))
    config = make_config(tmp_path, mlflow_uri=mlflow_server.url)
    mlflow_server.kill()
    try:
        for steps in (range(1, 8), range(5, 11)):
            handle = start_run(config, run_dir=str(run_dir))
            assert handle.run_id is None
            tracker = open_tracker(str(run_dir), system_metrics=False)
            for step in steps:
                tracker.log_metrics({"loss": step / 2}, step=step)
            tracker.log_artifact(str(tmp_path / "weights"), folder="model")
            tracker.close()
        assert not handle.finish("FAILED")
        assert any(f"raydist runs sync {run_dir}" in record.getMessage() for record in warnings.records)
        with pytest.raises(TrackingError, match="has not reached MLflow"):
            find_run(str(run_dir))
        with pytest.raises(TrackingError, match="cannot be reached") as caught:
            sync_run(str(run_dir))
        assert caught.value.where == mlflow_server.url
    finally:
        mlflow_server.start()

    run_id = sync_run(str(run_dir))
    assert sync_run(str(run_dir)) == run_id
    run = find_run(str(run_dir))
    assert run.status == "FAILED"
    record = handle.record
    assert record is not None
    assert (run.start_time_ms, run.end_time_ms) == (record.start_time_ms, record.end_time_ms)
    assert history(run.uri, run.run_id, "loss") == [(step, step / 2) for step in range(1, 11)]
    assert run.params["data.seq_len"] == "8"
    client = server.connect(run.uri)
    experiment = client.get_experiment_by_name("raydist").experiment_id
    mine = [r for r in client.search_runs([experiment]) if r.data.tags["raydist.run_dir"] == str(run_dir)]
    assert [r.info.run_id for r in mine] == [run_id]
    (path,) = pull(run, to=str(tmp_path / "out"), names=["model"])
    assert Path(path).read_bytes() == (tmp_path / "weights" / "w.bin").read_bytes()
