"""An MLflow experiment whose artifacts lie in a bucket: clients write and read them there themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raydist.core import storage
from raydist.tracking import server
from raydist.tracking.artifacts import log_folder
from raydist.tracking.find import TrackedRun, find_run
from raydist.tracking.mlflow_runs import start_run
from raydist.tracking.pull import pull
from tests.tracking.helpers import make_config


@pytest.fixture
def run(output_dir: Path, bucket: str) -> TrackedRun:
    config = make_config(output_dir, experiment="in-a-bucket")
    client = server.connect(f"sqlite:///{output_dir}/mlflow.db")
    client.create_experiment("in-a-bucket", artifact_location=f"{bucket}/artifacts")
    start_run(config, run_dir=str(output_dir / "small"))
    return find_run(str(output_dir / "small"))


def test_what_goes_to_the_bucket_comes_back(run: TrackedRun, bucket: str, tmp_path: Path) -> None:
    files = {"model.safetensors": os.urandom(6 << 20), "nested/config.json": b"{}\n"}
    for name, data in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    log_folder(run, str(tmp_path / "model"), name="model", max_bytes=64 << 20)

    stored = {name.split("artifacts/model/")[-1] for name in storage.list_files(bucket)}
    assert set(files) <= stored
    pull(run, to=str(tmp_path / "out"), names=["model"])
    assert {name: (tmp_path / "out" / "model" / name).read_bytes() for name in files} == files
