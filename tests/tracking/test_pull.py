"""Pulling in parallel, going on after a kill, and never writing outside of the target."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from raydist.core import storage
from raydist.core.errors import CapacityError, TrackingError
from raydist.tracking import pull as module
from raydist.tracking.artifacts import ArtifactFile, log_folder
from raydist.tracking.find import TrackedRun, find_run
from raydist.tracking.mlflow_runs import start_run
from raydist.tracking.pull import fetch_all, pull
from tests.servers.faulty_proxy import FaultyProxy
from tests.tracking.helpers import make_config

RANGE_BYTES = 1000


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RANGE_BYTES", RANGE_BYTES)
    monkeypatch.setattr(module, "_READ_BYTES", RANGE_BYTES // 2)


@pytest.fixture
def run(output_dir: Path) -> TrackedRun:
    start_run(make_config(output_dir), run_dir=str(output_dir / "small"))
    return find_run(str(output_dir / "small"))


def pointed(path: Path, data: bytes, *, name: str = "big.bin") -> ArtifactFile:
    path.write_bytes(data)
    return ArtifactFile(name, len(data), hashlib.sha256(data).hexdigest(), str(path))


def held_elsewhere(entry: ArtifactFile, scratch: str) -> str:
    raise AssertionError(f"MLflow was asked for {entry.name}")


def count_reads(monkeypatch: pytest.MonkeyPatch, *, fail_from: int | None = None) -> list[int]:
    """The first byte of each read; from some byte on the storage is away."""
    starts: list[int] = []
    read_range = storage.read_range

    def counted(path: str, *, start: int, stop: int) -> bytes:
        if fail_from is not None and start >= fail_from:
            raise ConnectionResetError("the storage is away")
        starts.append(start)
        return read_range(path, start=start, stop=stop)

    monkeypatch.setattr(storage, "read_range", counted)
    return starts


def break_off(entry: ArtifactFile, out: Path, *, at: int) -> None:
    """A pull whose storage goes away at a byte."""
    with pytest.MonkeyPatch.context() as patch:
        count_reads(patch, fail_from=at)
        with pytest.raises(ConnectionResetError):
            fetch_all([entry], to=str(out), held=held_elsewhere, num_threads=1)


@pytest.mark.usefixtures("small_ranges")
@pytest.mark.parametrize("num_bytes", [0, 1, RANGE_BYTES - 1, RANGE_BYTES, RANGE_BYTES + 1, 10 * RANGE_BYTES + 7])
def test_ranges_make_the_file(tmp_path: Path, num_bytes: int) -> None:
    data = os.urandom(num_bytes)
    seen: list[tuple[int, int]] = []
    entry = pointed(tmp_path / "source", data)
    (path,) = fetch_all(
        [entry], to=str(tmp_path / "out"), held=held_elsewhere, progress=lambda _, done, of: seen.append((done, of))
    )
    assert Path(path).read_bytes() == data
    assert os.listdir(tmp_path / "out") == ["big.bin"]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (num_bytes, num_bytes)


@pytest.mark.usefixtures("small_ranges")
def test_finished_ranges_are_not_fetched_again(tmp_path: Path) -> None:
    data = os.urandom(10 * RANGE_BYTES)
    entry = pointed(tmp_path / "source", data)
    break_off(entry, tmp_path / "out", at=6 * RANGE_BYTES)
    assert not (tmp_path / "out" / "big.bin").exists()
    with pytest.MonkeyPatch.context() as patch:
        starts = count_reads(patch)
        (path,) = fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere, num_threads=1)
    assert sorted(starts) == list(range(6 * RANGE_BYTES, 10 * RANGE_BYTES, RANGE_BYTES // 2))
    assert Path(path).read_bytes() == data
    assert os.listdir(tmp_path / "out") == ["big.bin"]


@pytest.mark.usefixtures("small_ranges")
def test_a_part_that_was_damaged_is_found_and_the_next_pull_begins_anew(tmp_path: Path) -> None:
    data = os.urandom(4 * RANGE_BYTES)
    entry = pointed(tmp_path / "source", data)
    break_off(entry, tmp_path / "out", at=2 * RANGE_BYTES)
    part = tmp_path / "out" / ".raydist-pull" / entry.sha256
    part.write_bytes(b"\0" * RANGE_BYTES + part.read_bytes()[RANGE_BYTES:])
    with pytest.raises(TrackingError, match="not what was logged"):
        fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere)
    (path,) = fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere)
    assert Path(path).read_bytes() == data


def test_files_come_at_the_same_time_and_not_more_than_allowed(tmp_path: Path) -> None:
    """Three transfers meet at a barrier, which fewer threads could not pass; a fourth is never under way with them."""
    barrier, lock = threading.Barrier(3, timeout=60), threading.Lock()
    counts = {"now": 0, "most": 0}

    def held(entry: ArtifactFile, scratch: str) -> str:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts.values())
        barrier.wait()
        with lock:
            counts["now"] -= 1
        path = os.path.join(scratch, "x")
        Path(path).write_bytes(entry.name.encode())
        return path

    names = [f"folder/{index}" for index in range(6)]
    entries = [ArtifactFile(name, len(name), hashlib.sha256(name.encode()).hexdigest()) for name in names]
    paths = fetch_all(entries, to=str(tmp_path), held=held, num_threads=3)
    assert [Path(path).read_text() for path in paths] == names
    assert counts["most"] == 3


def test_one_failure_ends_the_pull_and_keeps_what_is_right(run: TrackedRun, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for index in range(5):
        (tmp_path / "weights" / f"{index}.bin").write_bytes(os.urandom(100))
    log_folder(run, str(tmp_path / "weights"), name="model", max_bytes=10)
    (tmp_path / "weights" / "3.bin").write_bytes(os.urandom(100))
    with pytest.raises(TrackingError, match="not what was logged"):
        pull(run, to=str(tmp_path / "out"), names=["model"])
    kept = sorted(path.name for path in (tmp_path / "out").rglob("*.bin"))
    assert "3.bin" not in kept
    for name in kept:
        assert (tmp_path / "out" / "model" / name).read_bytes() == (tmp_path / "weights" / name).read_bytes()


@pytest.mark.parametrize("link", ["model", "model/deep"])
def test_a_link_that_leads_out_of_the_target_is_refused(tmp_path: Path, link: str) -> None:
    (tmp_path / "outside").mkdir()
    place = tmp_path / "out" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "outside", target_is_directory=True)
    entry = pointed(tmp_path / "source", b"data", name="model/deep/x.bin")
    with pytest.raises(TrackingError, match="leads out"):
        fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere)
    assert list((tmp_path / "outside").rglob("*")) == []


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_bytes(b"data")
    (tmp_path / "out" / "big.bin").symlink_to(tmp_path / "precious")
    entry = pointed(tmp_path / "source", b"data")
    (path,) = fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere)
    assert not os.path.islink(path)
    Path(path).write_bytes(b"changed")
    assert (tmp_path / "precious").read_bytes() == b"data"


def test_a_linked_parts_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "out" / ".raydist-pull").symlink_to(tmp_path / "outside", target_is_directory=True)
    entry = pointed(tmp_path / "source", b"data")
    with pytest.raises(TrackingError, match="leads out"):
        fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere)
    assert os.listdir(tmp_path / "outside") == []


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    entry = ArtifactFile("big.bin", 1 << 60, "0" * 64, str(tmp_path / "source"))
    with pytest.raises(CapacityError, match="too small"):
        fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere)


@pytest.mark.usefixtures("small_ranges")
def test_what_an_earlier_pull_left_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 MB, 600 kB are there and 900 kB are free beside them."""
    data = os.urandom(1000 * RANGE_BYTES)
    entry = pointed(tmp_path / "source", data)
    with pytest.MonkeyPatch.context() as patch:
        count_reads(patch, fail_from=600 * RANGE_BYTES)
        with pytest.raises(ConnectionResetError):
            fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere, num_threads=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 900_000))  # type: ignore[attr-defined]
    with pytest.raises(CapacityError):
        fetch_all([entry], to=str(tmp_path / "elsewhere"), held=held_elsewhere)
    (path,) = fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere)
    assert Path(path).read_bytes() == data


@pytest.mark.usefixtures("small_ranges")
def test_a_failed_pull_ends_after_the_transfers_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One range fails while another is being read; what that one writes must not meet a closed file."""
    entry = pointed(tmp_path / "source", os.urandom(2 * RANGE_BYTES))
    is_reading, ended = threading.Event(), threading.Event()
    closed_while_reading: list[bool] = []
    close = module._Ranges.close

    def read_range(path: str, *, start: int, stop: int) -> bytes:
        if start < RANGE_BYTES:
            is_reading.set()
            ended.wait(1.0 if start == 0 else 0)  # long enough for a close that does not wait
            return b"x" * (stop - start)
        is_reading.wait()
        raise ConnectionResetError("the storage is away")

    def noted_close(ranges: module._Ranges) -> None:
        closed_while_reading.append("0\n" not in Path(ranges._path + ".done").read_text())
        ended.set()
        close(ranges)

    monkeypatch.setattr(storage, "read_range", read_range)
    monkeypatch.setattr(module._Ranges, "close", noted_close)
    (tmp_path / "out" / ".raydist-pull").mkdir(parents=True)
    (tmp_path / "out" / ".raydist-pull" / f"{entry.sha256}.done").touch()
    with pytest.raises(ConnectionResetError):
        fetch_all([entry], to=str(tmp_path / "out"), held=held_elsewhere, num_threads=2)
    assert closed_while_reading == [False]


PULL = """
import sys
for name in ("ray", "torch", "transformers"):
    sys.modules[name] = None  # importing it fails
from raydist.tracking import pull
pull._RANGE_BYTES, pull._READ_BYTES = 1 << 20, 1 << 19
from raydist.cli.main import main
sys.exit(main(["artifacts", "pull", sys.argv[1], "--to", sys.argv[2], "--name", "model", "--json"]))
"""


def test_a_killed_pull_from_a_bucket_goes_on(run: TrackedRun, tmp_path: Path, s3_proxy: FaultyProxy) -> None:
    """SIGKILL in the middle of a large object, without Ray installed; the second pull fetches the rest only."""
    bucket = "s3://pulled"
    _make_bucket(bucket)
    data = os.urandom(24 << 20)
    storage.write_bytes(f"{bucket}/weights/model.safetensors", data)
    log_folder(run, f"{bucket}/weights", name="model", max_bytes=1000)
    out, run_dir = tmp_path / "out", str(Path(run.uri.removeprefix("sqlite:///")).parent / "small")

    s3_proxy.slow(bytes_per_s=2 << 20)
    first = subprocess.Popen(_command(run_dir, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (done := list(out.glob(".raydist-pull/*.done"))) or len(done[0].read_text().split()) < 4:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (out / "model" / "model.safetensors").exists()

    s3_proxy.pass_all()
    second = subprocess.run(_command(run_dir, out), capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert (out / "model" / "model.safetensors").read_bytes() == data
    assert [path.name for path in out.iterdir()] == ["model"]
    fetched = int(second.stdout.split('"num_fetched_bytes": ')[1].split(",")[0])
    assert 0 < fetched <= len(data) - 4 * (1 << 20)


def _command(run_dir: str, out: Path) -> Sequence[str]:
    return [sys.executable, "-c", PULL, run_dir, str(out)]


def _make_bucket(url: str) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket=url.removeprefix("s3://"))
