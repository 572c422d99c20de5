"""What comes back is what was logged, and nothing is written elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from raydist.core.errors import RaydistError, TrackingError
from raydist.tracking import server
from raydist.tracking.artifacts import MANIFEST, ArtifactFile, list_artifacts, log_folder, select
from raydist.tracking.find import TrackedRun, find_run
from raydist.tracking.mlflow_runs import start_run
from raydist.tracking.pull import pull
from tests.servers.mlflow_server import MlflowServer
from tests.tracking.helpers import make_config

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 5000, "tokenizer/vocab.txt": b"a\nb\n"}


@pytest.fixture
def run(output_dir: Path) -> TrackedRun:
    start_run(make_config(output_dir), run_dir=str(output_dir / "small"))
    return find_run(str(output_dir / "small"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "weights"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def stored(run: TrackedRun) -> Path:
    """Where MLflow keeps the files of a run."""
    return Path(server.connect(run.uri).get_run(run.run_id).info.artifact_uri)


def plant(run: TrackedRun, entries: list[dict[str, Any]]) -> None:
    server.connect(run.uri).log_text(run.run_id, json.dumps(entries), MANIFEST)


def entry(name: str, data: bytes, uri: str | None = None) -> dict[str, Any]:
    return {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "uri": uri}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip(run: TrackedRun, folder: Path, tmp_path: Path) -> None:
    log_folder(run, str(folder), name="model", max_bytes=1 << 30)
    pull(run, to=str(tmp_path / "out"), names=["model"])
    assert contents(tmp_path / "out") == {f"model/{name}": data for name, data in FILES.items()}
    listed = {e.name: (e.size, e.sha256, e.uri) for e in list_artifacts(run) if e.name.startswith("model/")}
    assert listed == {
        f"model/{name}": (len(data), hashlib.sha256(data).hexdigest(), None) for name, data in FILES.items()
    }


@pytest.mark.mlflow_server
def test_round_trip_through_a_server(mlflow_server: MlflowServer, folder: Path, tmp_path: Path) -> None:
    start_run(make_config(tmp_path, mlflow_uri=mlflow_server.url), run_dir=str(tmp_path / "small"))
    served = find_run("small", uri=mlflow_server.url, experiment="raydist")
    log_folder(served, str(folder), name="model", max_bytes=1000)
    pull(served, to=str(tmp_path / "out"), names=["model"])
    assert contents(tmp_path / "out" / "model") == FILES
    with pytest.raises(TrackingError, match="no such run"):
        find_run("smell", uri=mlflow_server.url)


def test_a_second_folder_is_added_and_an_old_name_replaced(run: TrackedRun, folder: Path, tmp_path: Path) -> None:
    log_folder(run, str(folder), name="model", max_bytes=1 << 30)
    (folder / "config.json").write_bytes(b"[]")
    log_folder(run, str(folder), name="model", max_bytes=1 << 30)
    log_folder(run, str(folder / "tokenizer"), name="", max_bytes=1 << 30)
    pull(run, to=str(tmp_path / "out"), names=["model/config.json", "*.txt"])
    assert contents(tmp_path / "out") == {
        "model/config.json": b"[]",
        "model/tokenizer/vocab.txt": b"a\nb\n",
        "vocab.txt": b"a\nb\n",
    }


def test_large_files_are_pointed_to(run: TrackedRun, folder: Path, tmp_path: Path) -> None:
    log_folder(run, str(folder), name="model", max_bytes=1000)
    pointers = {e.name: e.uri for e in list_artifacts(run) if e.uri}
    assert pointers == {"model/model.safetensors": str(folder / "model.safetensors")}
    assert not (stored(run) / "model" / "model.safetensors").exists()
    pull(run, to=str(tmp_path / "out"), names=["model"])
    assert contents(tmp_path / "out" / "model") == FILES

    (folder / "model.safetensors").unlink()
    with pytest.raises(TrackingError, match="is gone"):
        pull(run, to=str(tmp_path / "again"), names=["model"])


def test_a_folder_in_a_bucket(run: TrackedRun, tmp_path: Path) -> None:
    from raydist.core import storage

    root = f"memory://weights-{tmp_path.name}"
    for name, data in FILES.items():
        storage.write_bytes(f"{root}/{name}", data)
    log_folder(run, root, name="model", max_bytes=1000)
    log_folder(run, f"{root}/config.json", name="single", max_bytes=1000)
    names = {e.name for e in list_artifacts(run)}
    assert {f"model/{name}" for name in FILES} | {"single/config.json"} <= names
    pull(run, to=str(tmp_path / "out"), names=["model/config.json", "single"])
    assert contents(tmp_path / "out") == {"model/config.json": b"{}", "single/config.json": b"{}"}


@pytest.mark.parametrize("pointed", [False, True])
def test_a_changed_file_is_refused_and_leaves_nothing(
    run: TrackedRun, folder: Path, tmp_path: Path, pointed: bool
) -> None:
    log_folder(run, str(folder), name="model", max_bytes=1000 if pointed else 1 << 30)
    where = folder if pointed else stored(run) / "model"
    (where / "model.safetensors").write_bytes(b"w" * 4999 + b"x")
    with pytest.raises(TrackingError, match="not what was logged"):
        pull(run, to=str(tmp_path / "out"), names=["model/model.safetensors"])
    assert contents(tmp_path / "out") == {}
    assert os.listdir(tmp_path / "out") == []


def test_a_pull_that_broke_off_goes_on(run: TrackedRun, folder: Path, tmp_path: Path) -> None:
    log_folder(run, str(folder), name="model", max_bytes=1 << 30)
    out = tmp_path / "out"
    pull(run, to=str(out), names=["model/model.safetensors"])
    (out / "model" / "config.json").write_bytes(b"half of it")
    (stored(run) / "model" / "model.safetensors").unlink()  # so fetching it again would fail
    pull(run, to=str(out), names=["model"])
    assert contents(out / "model") == FILES


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "a\\..\\evil.txt", "C:evil.txt", "a//b", ".", ""]
)
def test_a_name_that_leaves_the_folder_is_refused(run: TrackedRun, tmp_path: Path, name: str) -> None:
    source = tmp_path / "source.txt"
    source.write_bytes(b"evil")
    plant(run, [entry(name, b"evil", uri=str(source))])
    with pytest.raises(RaydistError, match="leaves its folder"):
        pull(run, to=str(tmp_path / "deep" / "out"))
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1/x", "simplecache::file:///etc/hostname", "ftp://h/x"])
def test_a_pointer_to_something_else_than_storage_is_refused(run: TrackedRun, tmp_path: Path, uri: str) -> None:
    plant(run, [entry("x", b"x", uri=uri)])
    with pytest.raises(TrackingError, match="no storage"):
        pull(run, to=str(tmp_path / "out"))


@pytest.mark.parametrize("rows", [[1], [{"name": "x"}], {"name": "x"}, 7])
def test_a_damaged_list_says_so(run: TrackedRun, tmp_path: Path, rows: Any) -> None:
    plant(run, rows)
    with pytest.raises(TrackingError, match="is damaged"):
        pull(run, to=str(tmp_path / "out"))


def test_selection_names_the_nearest() -> None:
    entries = [ArtifactFile(name, 1, "0" * 64) for name in ("model/a.bin", "model/b.bin", "loss.png")]
    assert [e.name for e in select(entries, ["model/", "*.png"], where="")] == [
        "loss.png",
        "model/a.bin",
        "model/b.bin",
    ]
    assert select(entries, None, where="") == entries
    kept_aside = [ArtifactFile(name, 1, "0" * 64) for name in ("checkpoints/step-1/x", "registered/m/MLmodel")]
    assert select([*entries, *kept_aside], None, where="") == entries
    assert select([*entries, *kept_aside], ["checkpoints"], where="") == kept_aside[:1]
    with pytest.raises(TrackingError) as caught:
        select(entries, ["los.png"], where="run x")
    assert "loss.png" in (caught.value.fix or "")
    with pytest.raises(TrackingError, match="no artifacts"):
        select([], None, where="run x")


def test_an_empty_folder_logs_nothing(run: TrackedRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    before = list_artifacts(run)
    assert log_folder(run, str(tmp_path / "empty"), name="e", max_bytes=1) == []
    assert list_artifacts(run) == before
    shutil.rmtree(tmp_path / "empty")
