"""The object store is away, slow, or answers at random; files in it are damaged; the spool's disk is full."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from raydist.checkpoint.layout import complete_checkpoints, step_folder
from raydist.config.load import Recipe
from raydist.core import storage
from raydist.core.errors import CheckpointError, DataError
from raydist.tracking.jsonl import read_curve, read_records
from raydist.training.hooks import Hook
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import Outcome, run_attempt
from tests.faults.bucket_runs import assert_nothing_left, assert_same_curve, recipe_in
from tests.faults.disks import fill, small_disk
from tests.servers.faulty_proxy import FaultyProxy


@pytest.fixture
def proxied(bucket: str, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket that is reached through the proxy; an outage is waited for as long as a test sets."""
    monkeypatch.setenv("RAYDIST_STORAGE_RETRY_S", "60")
    return bucket


class At(Hook):
    """Calls something when a step has been logged."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step = step
        self.action = action

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.step:
            self.action()


class LostSaves(Hook):
    """The steps whose save failed."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_failed(self, step: int) -> None:
        self.steps.append(step)


def later(after_s: float, action: Callable[[], None]) -> None:
    threading.Timer(after_s, action).start()


def _refuse(proxy: FaultyProxy) -> None:
    proxy.refuse()
    later(4.0, proxy.pass_all)


def _errors(proxy: FaultyProxy, status: int) -> None:
    proxy.errors(rate=0.4, status=status)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("S3 server down for some seconds", _refuse),
        ("S3 server answers 503 at random", lambda proxy: _errors(proxy, 503)),
        ("S3 server answers 500 at random", lambda proxy: _errors(proxy, 500)),
        ("S3 server slow", lambda proxy: proxy.slow(bytes_per_s=200_000.0, delay_s=0.1)),
    ],
)
def test_training_goes_on_while_the_store_is_in_trouble_and_every_save_arrives(
    proxied: str, s3_proxy: FaultyProxy, dataset: str, tmp_path: Path, whole_in_bucket: dict[str, Any],
    name: str, fault: Callable[[FaultyProxy], None], record_fault: Callable[..., None],
) -> None:  # fmt: skip
    recipe = recipe_in(proxied, dataset, tmp_path, **{"checkpoint.keep": 3})
    run_dir = prepare_run_dir(recipe, resume=False)
    outcome = run_attempt(recipe, run_dir=run_dir, hooks=[At(3, lambda: fault(s3_proxy))])
    s3_proxy.pass_all()
    assert (outcome.step, outcome.interrupted) == (12, False)
    assert [checkpoint.step for checkpoint in complete_checkpoints(run_dir)] == [4, 8, 12]
    assert_same_curve(run_dir, whole_in_bucket)
    assert_nothing_left(tmp_path, run_dir)
    if "503" in name or "500" in name:
        assert {exchange.status for exchange in s3_proxy.exchanges} & {500, 503}
    record_fault(name, "training went on, every save arrived", steps_lost=0, recovery_s=None)


def test_an_outage_beyond_the_patience_costs_a_save_and_not_the_run(
    proxied: str, s3_proxy: FaultyProxy, dataset: str, tmp_path: Path, whole_in_bucket: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, record_fault: Callable[..., None],
) -> None:  # fmt: skip
    monkeypatch.setenv("RAYDIST_STORAGE_RETRY_S", "0.5")
    recipe = recipe_in(proxied, dataset, tmp_path)
    run_dir = prepare_run_dir(recipe, resume=False)
    # Saves wait for the one in flight, so the failure of step 4 is known at step 8, whose save comes too late as well.
    lost = LostSaves()
    hooks = [At(3, s3_proxy.refuse), At(9, s3_proxy.pass_all), lost]
    with caplog.at_level(logging.WARNING, logger="raydist"):
        outcome = run_attempt(recipe, run_dir=run_dir, hooks=hooks)
    assert outcome.step == 12
    assert_same_curve(run_dir, whole_in_bucket)
    failed = dict(read_curve(f"{run_dir}/metrics.jsonl")["checkpoint/failed"])
    assert failed[4] == 1.0
    assert lost.steps == [step for step, value in failed.items() if value]
    assert failed[12] == 0.0
    assert caplog.text.count("the checkpoint of step 4 is not stored, the older ones stay valid") == 1
    assert complete_checkpoints(run_dir)[-1].step == 12
    assert_nothing_left(tmp_path, run_dir)
    record_fault("S3 server down beyond all retries", "a save is lost, the run is not", steps_lost=0, recovery_s=None)


def test_only_a_last_save_that_cannot_be_stored_ends_the_run_in_an_error(
    proxied: str, s3_proxy: FaultyProxy, dataset: str, tmp_path: Path, whole_in_bucket: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, record_fault: Callable[..., None],
) -> None:  # fmt: skip
    monkeypatch.setenv("RAYDIST_STORAGE_RETRY_S", "0.5")
    recipe = recipe_in(proxied, dataset, tmp_path)
    run_dir = prepare_run_dir(recipe, resume=False)
    with pytest.raises(CheckpointError, match="could not be stored") as caught:
        run_attempt(recipe, run_dir=run_dir, hooks=[At(10, s3_proxy.refuse)])
    assert "cannot be reached" in str(caught.value)
    s3_proxy.pass_all()
    started = time.monotonic()
    assert run_attempt(recipe, run_dir=run_dir).step == 12
    recovery_s = time.monotonic() - started
    assert_same_curve(run_dir, whole_in_bucket)
    record_fault("S3 server down at the end", "one screen; --resume finishes", steps_lost=4, recovery_s=recovery_s)


def interrupted_at(step: int, recipe: Recipe, run_dir: str) -> Outcome:
    calls = iter(range(1, 1000))
    return run_attempt(recipe, run_dir=run_dir, notice=lambda: "drained" if next(calls) >= step else None)


def _flip(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]


@pytest.mark.parametrize(
    ("name", "damage"), [("bit-flipped", _flip), ("truncated", lambda content: content[: len(content) // 2])]
)
def test_a_damaged_checkpoint_in_the_bucket_is_passed_over(
    bucket: str, dataset: str, tmp_path: Path, whole_in_bucket: dict[str, Any], caplog: pytest.LogCaptureFixture,
    name: str, damage: Callable[[bytes], bytes], record_fault: Callable[..., None],
) -> None:  # fmt: skip
    recipe = recipe_in(bucket, dataset, tmp_path)
    run_dir = prepare_run_dir(recipe, resume=False)
    interrupted_at(8, recipe, run_dir)
    shard = f"{step_folder(run_dir, 8)}/rank-0000.safetensors"
    storage.write_bytes(shard, damage(storage.read_bytes(shard)))
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="raydist"):
        assert run_attempt(recipe, run_dir=run_dir).step == 12
    recovery_s = time.monotonic() - started
    assert "checkpoint of step 8 is passed over, trying an older one" in caplog.text
    first = next(record["step"] for record in read_records(f"{run_dir}/metrics.jsonl") if record["attempt"] == 2)
    assert first == 5
    assert_same_curve(run_dir, whole_in_bucket)
    assert [checkpoint.step for checkpoint in complete_checkpoints(run_dir)] == [8, 12]
    record_fault(f"{name} checkpoint file", "went on from the one before", steps_lost=4, recovery_s=recovery_s)


def test_a_corrupted_shard_in_the_bucket_is_one_screen_that_names_it(
    bucket: str, dataset: str, tmp_path: Path, record_fault: Callable[..., None]
) -> None:
    for name in storage.list_files(dataset):
        storage.upload_file(f"{dataset}/{name}", f"{bucket}/data/{name}")
    (name,) = (name for name in storage.list_names(f"{bucket}/data/train") if name.startswith("shard-"))
    content = bytearray(storage.read_bytes(f"{bucket}/data/train/{name}"))
    content[len(content) // 2] ^= 1
    storage.write_bytes(f"{bucket}/data/train/{name}", bytes(content))
    recipe = recipe_in(bucket, f"{bucket}/data", tmp_path)
    with pytest.raises(DataError) as caught:
        run_attempt(recipe, run_dir=prepare_run_dir(recipe, resume=False))
    assert name in (caught.value.where or "")
    assert "sha256" in (caught.value.found or "")
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not [name for name in left if "partial" in name]
    record_fault("corrupted shard in the bucket", "one screen that names the shard", steps_lost=None, recovery_s=None)


@pytest.fixture
def spool_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small") as folder:
        yield folder


def test_a_full_spool_costs_a_save_and_the_next_one_succeeds(
    bucket: str, dataset: str, tmp_path: Path, whole_in_bucket: dict[str, Any], spool_disk: Path,
    caplog: pytest.LogCaptureFixture, record_fault: Callable[..., None],
) -> None:  # fmt: skip
    ballast = spool_disk / "ballast"
    recipe = recipe_in(bucket, dataset, tmp_path, **{"checkpoint.spool_dir": str(spool_disk), "checkpoint.keep": 3})
    run_dir = prepare_run_dir(recipe, resume=False)
    hooks = [At(5, lambda: fill(ballast)), At(9, ballast.unlink)]
    with caplog.at_level(logging.WARNING, logger="raydist"):
        assert run_attempt(recipe, run_dir=run_dir, hooks=hooks).step == 12
    assert "the checkpoint of step 8 is not stored" in caplog.text
    assert "choose another disk by checkpoint.spool_dir" in caplog.text
    assert [checkpoint.step for checkpoint in complete_checkpoints(run_dir)] == [4, 12]
    assert list(spool_disk.iterdir()) == []
    assert_same_curve(run_dir, whole_in_bucket)
    record_fault("disk full on the checkpoint spool", "a save is lost, the run is not", steps_lost=0, recovery_s=None)
