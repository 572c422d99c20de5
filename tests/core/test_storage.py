"""The same checks on a local folder and on a remote (in-memory) filesystem."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import pytest

from raydist.core import storage
from raydist.core.errors import RaydistError, StorageError


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://bucket-{uuid.uuid4().hex}"


def test_round_trip_listing_and_removal(root: str) -> None:
    for name in ("a/one.bin", "a/deep/two.bin", "three.bin"):
        storage.write_bytes(storage.join(root, *name.split("/")), name.encode())
    assert storage.read_bytes(storage.join(root, "a", "one.bin")) == b"a/one.bin"
    assert storage.size_bytes(storage.join(root, "three.bin")) == len("three.bin")
    assert storage.list_names(root) == ["a", "three.bin"]
    assert storage.list_files(root) == ["a/deep/two.bin", "a/one.bin", "three.bin"]
    assert storage.sha256(storage.join(root, "three.bin")) == hashlib.sha256(b"three.bin").hexdigest()
    storage.remove_tree(storage.join(root, "a"))
    assert storage.list_files(root) == ["three.bin"]
    assert not storage.exists(storage.join(root, "a"))
    storage.remove_tree(storage.join(root, "a"))


def test_upload_and_download(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(3_000_000))
    storage.upload_file(str(source), storage.join(root, "there", "copy.bin"))
    storage.download_file(storage.join(root, "there", "copy.bin"), str(tmp_path / "back" / "again.bin"))
    assert (tmp_path / "back" / "again.bin").read_bytes() == source.read_bytes()


def test_json_is_stable(root: str) -> None:
    path = storage.join(root, "x.json")
    storage.write_json(path, {"b": 1, "a": [1, 2]})
    assert storage.read_json(path) == {"a": [1, 2], "b": 1}
    assert storage.read_bytes(path).startswith(b'{\n  "a"')


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def stop_half_way() -> None:
        with storage.atomic_file(str(target)) as partial:
            Path(partial).write_bytes(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a//b", ".", "c:\\x", "a\nb", "a/.."])
def test_names_from_outside_stay_inside(name: str) -> None:
    with pytest.raises(RaydistError, match="leaves its folder"):
        storage.safe_name(name, where="manifest")


def test_good_names_pass() -> None:
    assert (
        storage.safe_name("export/model-00001-of-00002.safetensors", where="x")
        == "export/model-00001-of-00002.safetensors"
    )


def test_normalize() -> None:
    assert storage.normalize("s3://bucket/prefix/") == "s3://bucket/prefix"
    assert storage.normalize("runs") == os.path.join(os.getcwd(), "runs")
    assert storage.is_remote("s3://x")
    assert not storage.is_remote("file:///x")


def test_what_cannot_be_looked_at_does_not_count_as_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert storage.exists(str(tmp_path / "file"))
    for name in ("nothing", "file/below", "dangling", "x" * 300, "a\0b"):
        assert not storage.exists(str(tmp_path / name))
    with pytest.raises(StorageError, match=r"cannot be looked at[^~]*symbolic links"):
        storage.exists(str(tmp_path / "loop"))


def test_a_bucket_that_the_run_has_used_gets_the_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s: dict[str, float] = {}
    monkeypatch.setattr(storage, "_reached", set())
    monkeypatch.setattr(storage, "retry", lambda call, *, what, total_s, is_transient: waits_s.update({what: total_s}))
    storage.was_reached("memory://run/name", "runs/local", "memory://data")
    for path in ("memory://run/name/x", "memory://data/x", "memory://new/x"):
        storage.exists(path)
    assert list(waits_s.values()) == [300.0, 300.0, 45.0]
