"""Storage on a real S3 server: what differs from a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raydist.core import storage
from raydist.core.errors import StorageError
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.object_store import ObjectStore


def test_a_large_file_goes_up_in_parts_and_comes_back_in_ranges(
    bucket: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    content = os.urandom((40 << 20) + 123)
    (tmp_path / "large").write_bytes(content)
    storage.upload_file(str(tmp_path / "large"), f"{bucket}/large")
    assert storage.size_bytes(f"{bucket}/large") == len(content)
    parts = [exchange for exchange in s3_proxy.exchanges if "partNumber=" in exchange.path]
    assert len(parts) == 3
    assert max(part.sent_bytes for part in parts) < 17 << 20
    before = s3_proxy.received_bytes(part="large")
    start, stop = 5, (36 << 20) + 7
    assert storage.read_range(f"{bucket}/large", start=start, stop=stop) == content[start:stop]
    assert s3_proxy.received_bytes(part="large") - before == stop - start
    with storage.open_read(f"{bucket}/large") as stream:
        stream.seek(30 << 20)
        assert stream.read(100) == content[30 << 20 :][:100]
    storage.download_file(f"{bucket}/large", str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == content
    assert storage.sha256(f"{bucket}/large") == storage.sha256(str(tmp_path / "large"))


def test_an_upload_that_is_cut_off_leaves_no_parts_behind(
    bucket: str, s3_proxy: FaultyProxy, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    monkeypatch.setenv("RAYDIST_STORAGE_RETRY_S", "0")
    (tmp_path / "large").write_bytes(bytes(33 << 20))
    s3_proxy.errors(rate=1.0, status=500, only="partNumber=")
    with pytest.raises(StorageError, match="cannot be reached"):
        storage.upload_file(str(tmp_path / "large"), f"{bucket}/large")
    s3_proxy.pass_all()
    assert not storage.exists(f"{bucket}/large")
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    assert not uploads.get("Uploads")


def test_errors_that_pass_are_waited_for(bucket: str, s3_proxy: FaultyProxy) -> None:
    s3_proxy.errors(rate=0.7, status=503)
    for number in range(5):
        storage.write_json(f"{bucket}/{number}.json", number)
        assert storage.read_json(f"{bucket}/{number}.json") == number
    assert storage.list_names(bucket) == [f"{number}.json" for number in range(5)]
    assert {exchange.status for exchange in s3_proxy.exchanges} >= {200, 503}


def test_an_outage_ends_in_one_screen(bucket: str, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDIST_STORAGE_RETRY_S", "0.5")
    storage.write_bytes(f"{bucket}/x", b"x")
    s3_proxy.refuse()
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        storage.read_bytes(f"{bucket}/x")
    assert caught.value.where == f"{bucket}/x"
    assert "AWS_ENDPOINT_URL" in (caught.value.fix or "")


def test_what_is_missing_is_not_an_outage(bucket: str) -> None:
    assert not storage.exists(f"{bucket}/nothing")
    assert storage.list_names(f"{bucket}/nothing") == []
    for read in (storage.read_bytes, storage.size_bytes):
        with pytest.raises(FileNotFoundError):
            read(f"{bucket}/nothing")
    with pytest.raises(StorageError, match="no such bucket"):
        storage.write_bytes("s3://there-is-no-such-bucket/x", b"")


def test_folders_are_fetched_and_filled(bucket: str, tmp_path: Path) -> None:
    with storage.filled(f"{bucket}/pictures") as folder:
        Path(folder, "deep").mkdir()
        Path(folder, "deep", "one.txt").write_text("1")
        Path(folder, "two.txt").write_text("2")
    assert storage.list_files(f"{bucket}/pictures") == ["deep/one.txt", "two.txt"]
    with storage.fetched(f"{bucket}/pictures") as folder:
        assert Path(folder, "deep", "one.txt").read_text() == "1"
    assert not Path(folder).exists()

    def fail() -> None:
        with storage.filled(f"{bucket}/broken") as scratch:
            Path(scratch, "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not storage.exists(f"{bucket}/broken")


def test_a_remote_part_stands_alone() -> None:
    assert storage.join("runs", "s3://bucket/run", "export") == "s3://bucket/run/export"
    assert storage.join("s3://other", "s3://bucket/run") == "s3://bucket/run"
    assert storage.join("s3://bucket", "a", "b") == "s3://bucket/a/b"


def test_large_ranges_wait_for_errors_that_pass(bucket: str, s3_proxy: FaultyProxy) -> None:
    content = os.urandom((40 << 20) + 123)
    storage.write_bytes(f"{bucket}/large", content)
    s3_proxy.errors(rate=0.9, status=503, only="/large")
    assert storage.read_range(f"{bucket}/large", start=5, stop=len(content)) == content[5:]
    assert {exchange.status for exchange in s3_proxy.exchanges if exchange.method == "GET"} >= {206, 503}


def test_what_a_bulk_deletion_leaves_is_deleted_too(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers with an error per object, which s3fs drops."""
    import s3fs

    whole = s3fs.S3FileSystem._bulk_delete
    kept: list[str] = []

    async def all_but_one(self: s3fs.S3FileSystem, paths: list[str]) -> list[str]:
        kept.append(paths[-1])
        return list(await whole(self, paths[:-1]))

    monkeypatch.setattr(s3fs.S3FileSystem, "_bulk_delete", all_but_one)
    for name in ("step/a", "step/deep/b", "step/c", "stepped"):
        storage.write_bytes(f"{bucket}/{name}", b"x")
    storage.remove_tree(f"{bucket}/step")
    assert len(kept) == 1
    assert storage.list_files(bucket) == ["stepped"]


def test_an_upload_that_the_server_no_longer_knows_is_sent_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a completion whose answer was lost: the client repeats it and is told that there is no such upload."""
    import s3fs

    whole = s3fs.S3FileSystem._call_s3
    num_completed = 0

    async def aborted_once(self: s3fs.S3FileSystem, method: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_completed
        if method == "complete_multipart_upload":
            num_completed += 1
            if num_completed == 1:
                upload = {key: kwargs[key] for key in ("Bucket", "Key", "UploadId")}
                await whole(self, "abort_multipart_upload", **upload)
        return await whole(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", aborted_once)
    content = os.urandom(33 << 20)
    (tmp_path / "large").write_bytes(content)
    storage.upload_file(str(tmp_path / "large"), f"{bucket}/large")
    assert storage.read_bytes(f"{bucket}/large") == content
    assert num_completed == 2


_WITH_A_PROFILE = """
import sys
import pyarrow.fs
from raydist.core import storage
path = sys.argv[1] + "/by-profile.json"
storage.write_json(path, [1])
assert storage.read_json(path) == [1]
filesystem, name = pyarrow.fs.FileSystem.from_uri(path)  # what Ray takes for its own files
assert filesystem.get_file_info(name).type == pyarrow.fs.FileType.File
"""


def test_credentials_may_come_from_a_profile(bucket: str, tmp_path: Path) -> None:
    profile = tmp_path / "credentials"
    profile.write_text(
        "[default]\naws_access_key_id = nobody\naws_secret_access_key = wrong\n"
        f"[lab]\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {os.environ['AWS_SECRET_ACCESS_KEY']}\n"
    )
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    environment = {name: value for name, value in os.environ.items() if name not in keys}
    environment |= {"AWS_SHARED_CREDENTIALS_FILE": str(profile), "RAYDIST_STORAGE_RETRY_S": "0"}
    for name, exit_code in (("lab", 0), ("default", 1)):
        done = subprocess.run(
            [sys.executable, "-c", _WITH_A_PROFILE, bucket],
            env={**environment, "AWS_PROFILE": name}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == exit_code, done.stderr
    assert "AWS_PROFILE" in done.stderr, "the error names what to check"
