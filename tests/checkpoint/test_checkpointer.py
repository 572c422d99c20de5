"""Damage, interruption, slow and failing storage: which checkpoint is loaded, and what the training loop sees."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from raydist.checkpoint import files, store
from raydist.checkpoint.checkpointer import Checkpointer
from raydist.checkpoint.layout import MARKER, complete_checkpoints, newest_complete, read_checkpoint, step_folder
from raydist.checkpoint.load import load_checkpoint
from raydist.checkpoint.staging import HostBuffers
from raydist.checkpoint.store import PeerWait, spool_path
from raydist.core import storage
from raydist.core.dist import Workers
from raydist.core.errors import CheckpointError, ResumeError, StorageError
from tests.checkpoint.cases import Small, advance, assert_equal, checkpointer_of_one, make, whole_state

SHARD = "rank-0000.safetensors"
RUN = "faulty://bucket/run"


def _saved_at(run_dir: str, steps: list[int], *, keep: int = 2) -> dict[int, dict[str, torch.Tensor]]:
    """Trains and saves at these steps; returns the state at each of them."""
    model, optimizer = make()
    states = {}
    with checkpointer_of_one(run_dir, keep=keep) as checkpointer:
        for number, step in enumerate(steps, start=1):
            advance(model, optimizer)
            states[step] = whole_state(model, optimizer)
            checkpointer.save(step, model=model, optimizer=optimizer, trainer_state={"number": number})
    return states


def _loaded(run_dir: str) -> tuple[int | None, dict[str, torch.Tensor]]:
    model, optimizer = make()
    with checkpointer_of_one(run_dir) as checkpointer:
        trainer_state = checkpointer.load_newest(model, optimizer=optimizer)
    return (trainer_state["step"] if trainer_state else None), whole_state(model, optimizer)


def test_a_run_without_checkpoints_starts_from_its_own_weights(tmp_path: Path) -> None:
    step, state = _loaded(str(tmp_path))
    assert step is None
    assert_equal(state, whole_state(*make()))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (MARKER, Path.unlink),
        (MARKER, lambda path: path.write_text("{")),
        (MARKER, lambda path: path.write_text("[]")),
        (SHARD, Path.unlink),
        (SHARD, lambda path: path.write_bytes(path.read_bytes()[:-1])),
        (SHARD, _flip),
        ("metadata.json", Path.unlink),
        ("metadata.json", _flip),
        ("trainer.json", _flip),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], Any]
) -> None:
    states = _saved_at(str(tmp_path), [10, 20])
    damage(Path(step_folder(str(tmp_path), 20)) / name)
    with caplog.at_level(logging.WARNING, logger="raydist"):
        step, state = _loaded(str(tmp_path))
    assert step == 10
    assert_equal(state, states[10])
    assert ("step 20" in caplog.text) == (damage is not Path.unlink or name != MARKER)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_again(tmp_path: Path) -> None:
    _saved_at(str(tmp_path), [10, 20])
    for step in (10, 20):
        _flip(Path(step_folder(str(tmp_path), step)) / SHARD)
    with pytest.raises(CheckpointError, match="no checkpoint of the run can be loaded"):
        _loaded(str(tmp_path))


def test_listing_verifies_sizes(tmp_path: Path) -> None:
    _saved_at(str(tmp_path), [10, 20, 30], keep=3)
    (Path(step_folder(str(tmp_path), 30)) / SHARD).write_bytes(b"short")
    assert [checkpoint.step for checkpoint in complete_checkpoints(str(tmp_path))] == [10, 20]
    newest = newest_complete(str(tmp_path))
    assert newest is not None
    assert newest.step == 20
    folder = Path(newest.folder)
    assert newest.total_bytes() == sum((folder / name).stat().st_size for name in newest.files)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("files", {"../../secret": {"size_bytes": 1, "sha256": "", "block_sha256": []}}, "cannot be read"),
        ("format_version", 99, "another format"),
    ],
)
def test_a_marker_that_is_not_ours_is_refused(tmp_path: Path, key: str, value: Any, what: str) -> None:
    _saved_at(str(tmp_path), [10])
    folder = step_folder(str(tmp_path), 10)
    marker = storage.read_json(f"{folder}/{MARKER}")
    storage.write_json(f"{folder}/{MARKER}", {**marker, key: value})
    with pytest.raises(CheckpointError, match=what):
        read_checkpoint(folder)


def test_a_planted_pickle_is_never_run(tmp_path: Path) -> None:
    run, proof = tmp_path / "run", tmp_path / "executed"
    pickled = f"cbuiltins\nopen\n(S'{proof}'\nS'w'\ntR.".encode()
    _saved_at(str(run), [10])
    folder = Path(step_folder(str(run), 10))
    (folder / ".metadata").write_bytes(pickled)
    assert _loaded(str(run))[0] == 10
    marker = json.loads((folder / MARKER).read_text())
    for name in (SHARD, "metadata.json", "trainer.json"):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(pickled)
        trusted = {**marker, "files": {**marker["files"], name: files.record_of_bytes(pickled).to_json()}}
        (folder / MARKER).write_text(json.dumps(trusted))
        with pytest.raises(CheckpointError):
            _loaded(str(run))
        (folder / name).write_bytes(original)
    assert not proof.exists()
    load = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", load, str(folder / ".metadata")], check=True)
    assert proof.exists()


def test_retention_on_storage(tmp_path: Path) -> None:
    run = str(tmp_path)
    Path(step_folder(run, 15)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000005.deleted-abc").mkdir()
    _saved_at(run, [10, 20, 30, 40], keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000030", "step-00000040"]


def test_a_step_that_is_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    _saved_at(str(tmp_path), [10])
    (Path(step_folder(str(tmp_path), 10)) / "rank-0001.json").write_text("{}")
    states = _saved_at(str(tmp_path), [5, 10])
    step, state = _loaded(str(tmp_path))
    assert step == 10
    assert_equal(state, states[10])
    assert not (Path(step_folder(str(tmp_path), 10)) / "rank-0001.json").exists()


def test_only_the_model_is_read_when_only_the_model_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 32)
    states = _saved_at(str(tmp_path), [10])
    checkpoint = newest_complete(str(tmp_path))
    assert checkpoint is not None
    shard = Path(checkpoint.folder) / SHARD
    content = bytearray(shard.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    offsets = json.loads(content[8 : 8 + header_bytes])["optimizer.embedding.exp_avg_sq@0,0"]["data_offsets"]
    content[8 + header_bytes + sum(offsets) // 2] ^= 1
    shard.write_bytes(content)
    model, optimizer = make()
    load_checkpoint(checkpoint, model)
    assert torch.equal(model.state_dict()["embedding"], states[10]["model.embedding"])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(checkpoint, model, optimizer=optimizer)


class Wider(Small):
    """Another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(2, 4))


class Deeper(Small):
    """Another parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(("kind", "word"), [(Wider, "model.row"), (Deeper, "model.other")])
def test_another_model_is_refused_before_anything_is_overwritten(tmp_path: Path, kind: type[Small], word: str) -> None:
    _saved_at(str(tmp_path), [10])
    model = kind()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with checkpointer_of_one(str(tmp_path)) as checkpointer, pytest.raises(ResumeError, match=word):
        checkpointer.load_newest(model)
    assert_equal(dict(model.state_dict()), before)


class FaultyFileSystem(MemoryFileSystem):
    """A bucket whose gate can be closed, and whose n-th write from now on can fail."""

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    gate = threading.Event()
    writes_before_failure = -1

    def _write(self) -> None:
        if not FaultyFileSystem.gate.wait(timeout=60):
            raise TimeoutError("the test never opened the gate")
        FaultyFileSystem.writes_before_failure -= 1
        if FaultyFileSystem.writes_before_failure == -1:
            raise OSError("503 slow down")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._write()
        super().pipe_file(path, value, mode=mode, **kwargs)

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._write()
        super().pipe_file(rpath, Path(lpath).read_bytes())


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FaultyFileSystem]:
    """Every test's bucket has the same name, so each gets a spool folder of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]
    FaultyFileSystem.gate.set()
    FaultyFileSystem.writes_before_failure = -1
    return FaultyFileSystem


def test_a_bucket_holds_what_a_folder_holds(bucket: type[FaultyFileSystem], tmp_path: Path) -> None:
    in_bucket, in_folder = _saved_at(RUN, [10, 20, 30]), _saved_at(str(tmp_path), [10, 20, 30])
    assert_equal(in_bucket[30], in_folder[30])
    assert [checkpoint.step for checkpoint in complete_checkpoints(RUN)] == [20, 30]
    assert storage.list_files(f"{RUN}/checkpoints") == storage.list_files(str(tmp_path / "checkpoints"))
    step, state = _loaded(RUN)
    assert step == 30
    assert_equal(state, in_folder[30])


def test_training_goes_on_while_the_bucket_does_not_answer(bucket: type[FaultyFileSystem], tmp_path: Path) -> None:
    model, optimizer = make()
    advance(model, optimizer)
    state = whole_state(model, optimizer)
    with checkpointer_of_one(RUN, spool_dir=str(tmp_path)) as checkpointer:
        bucket.gate.clear()
        checkpointer.save(1, model=model, optimizer=optimizer, trainer_state={})
        advance(model, optimizer)
        assert newest_complete(RUN) is None
        bucket.gate.set()
    step, loaded = _loaded(RUN)
    assert step == 1
    assert_equal(loaded, state)
    assert list(tmp_path.iterdir()) == []


def test_the_next_update_waits_for_the_copy_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is held up until an update waits for it; forward and backward are done before."""
    model, optimizer = make()
    advance(model, optimizer)
    state = whole_state(model, optimizer)
    gate, order = threading.Event(), []
    copy = HostBuffers.copy

    def held(self: HostBuffers, tensors: Any, **options: Any) -> Any:
        assert gate.wait(60)
        order.append("copied")
        return copy(self, tensors, **options)

    monkeypatch.setattr(HostBuffers, "copy", held)
    with checkpointer_of_one(str(tmp_path)) as checkpointer:
        checkpointer.save(1, model=model, optimizer=optimizer, trainer_state={})
        model(torch.arange(7)).sum().backward()
        order.append("backward done")
        threading.Timer(0.2, gate.set).start()
        optimizer.step()
        order.append("updated")
        checkpointer.wait()
        (result,) = checkpointer.take_results()
    assert order == ["backward done", "copied", "updated"]
    assert result.held_s > 0.1
    step, loaded = _loaded(str(tmp_path))
    assert step == 1
    assert_equal(loaded, state)


def test_a_copy_that_cannot_be_made_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: HostBuffers, tensors: Any, **options: Any) -> Any:
        raise MemoryError("no pages left")

    states = _saved_at(str(tmp_path), [10])
    model, optimizer = make()
    monkeypatch.setattr(HostBuffers, "copy", full)
    with checkpointer_of_one(str(tmp_path)) as checkpointer:
        checkpointer.save(20, model=model, optimizer=optimizer, trainer_state={})
        advance(model, optimizer)
        with pytest.raises(CheckpointError, match="no pages left"):
            checkpointer.wait()
        monkeypatch.undo()
        assert_equal(_loaded(str(tmp_path))[1], states[10])
        checkpointer.save(30, model=model, optimizer=optimizer, trainer_state={})
    assert _loaded(str(tmp_path))[0] == 30


def test_a_run_that_is_lost_keeps_the_checkpoint_that_the_other_driver_wrote(tmp_path: Path) -> None:
    """The step's folder is there, and not ours to remove."""
    states = _saved_at(str(tmp_path), [1])
    workers = Workers(0, 0, 1, torch.device("cpu"))
    model, optimizer = make()
    late = Checkpointer(str(tmp_path), keep=2, workers=workers, is_ours=lambda: False)
    late.save(1, model=model, optimizer=optimizer, trainer_state={})
    with pytest.raises(ResumeError, match="taken this run over"):
        late.close()
    step, loaded = _loaded(str(tmp_path))
    assert step == 1
    assert_equal(loaded, states[1])


def test_a_save_asks_the_bucket_for_nothing_in_the_loops_thread(
    bucket: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What there is was listed when the run was loaded."""
    _saved_at(RUN, [1])
    model, optimizer = make()
    with checkpointer_of_one(RUN) as checkpointer:
        checkpointer.load_newest(model, optimizer=optimizer)
        asked: list[str] = []
        monkeypatch.setattr(FaultyFileSystem, "ls", lambda self, path, **kw: asked.append(path) or [])
        bucket.gate.clear()
        checkpointer.save(2, model=model, optimizer=optimizer, trainer_state={})
        assert asked == []
        monkeypatch.undo()
        bucket.gate.set()
    assert _loaded(RUN)[0] == 2


def test_a_run_that_is_lost_while_a_save_is_stored_gets_no_marker(tmp_path: Path) -> None:
    """It is ours when the save begins, and another driver's before the marker."""
    answers = iter([True, False])
    model, optimizer = make()
    workers = Workers(0, 0, 1, torch.device("cpu"))
    checkpointer = Checkpointer(str(tmp_path), keep=2, workers=workers, is_ours=lambda: next(answers))
    checkpointer.save(1, model=model, optimizer=optimizer, trainer_state={})
    with pytest.raises(ResumeError, match="taken this run over"):
        checkpointer.close()
    assert newest_complete(str(tmp_path)) is None
    with pytest.raises(ResumeError, match="taken this run over"):
        checkpointer.save(2, model=model, optimizer=optimizer, trainer_state={})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("num_writes", range(5))
def test_an_upload_that_fails_at_any_file_is_invisible_and_reported(
    bucket: type[FaultyFileSystem], num_writes: int
) -> None:
    states = _saved_at(RUN, [10])
    model, optimizer = make()
    with checkpointer_of_one(RUN) as checkpointer:
        bucket.writes_before_failure = num_writes
        checkpointer.save(20, model=model, optimizer=optimizer, trainer_state={})
        with pytest.raises(CheckpointError, match="could not be stored"):
            checkpointer.wait()
        step, state = _loaded(RUN)
        assert step == 10
        assert_equal(state, states[10])
        bucket.writes_before_failure = num_writes
        checkpointer.save(30, model=model, optimizer=optimizer, trainer_state={})
        checkpointer.save(40, model=model, optimizer=optimizer, trainer_state={})
        checkpointer.wait()
        failed = {result.step: result.error is not None for result in checkpointer.take_results()}
        assert failed == {20: True, 30: True, 40: False}
    assert [checkpoint.step for checkpoint in complete_checkpoints(RUN)] == [10, 40]
    assert storage.list_names(f"{RUN}/checkpoints") == ["step-00000010", "step-00000040"]


def test_a_bucket_that_cannot_be_asked_is_an_error_and_not_a_fresh_start(
    bucket: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FaultyFileSystem, path: str, **kwargs: Any) -> list[Any]:
        raise PermissionError("access denied")

    monkeypatch.setattr(FaultyFileSystem, "ls", refuse)
    with pytest.raises(StorageError, match="access denied"):
        _loaded(RUN)


def test_the_spool_file_is_one_per_run_and_worker(tmp_path: Path) -> None:
    def path_of(run: str, step: int, rank: int) -> str:
        return spool_path(step_folder(run, step), rank=rank, spool_dir=str(tmp_path))

    assert path_of("s3://b/one", 1, 0) == path_of("s3://b/one", 2, 0)
    assert len({path_of("s3://b/one", 1, 0), path_of("s3://b/one", 1, 1), path_of("s3://b/two", 1, 0)}) == 3


def test_a_done_file_of_a_killed_attempt_does_not_count(tmp_path: Path) -> None:
    path = str(tmp_path / "rank-0001.json")
    storage.write_json(path, {"save_id": "old", "record": "stale"})
    with pytest.raises(CheckpointError, match="another worker did not store"):
        PeerWait(timeout_s=0.05).done_file(path, save_id="new")
    later = threading.Timer(0.1, storage.write_json, (path, {"save_id": "new", "record": "fresh"}))
    later.start()
    assert PeerWait(timeout_s=60).done_file(path, save_id="new")["record"] == "fresh"


def test_a_run_that_ends_in_an_error_does_not_wait_for_lost_workers(tmp_path: Path) -> None:
    peers = PeerWait(timeout_s=3600)
    threading.Timer(0.05, peers.shorten, kwargs={"timeout_s": 0.0}).start()
    with pytest.raises(CheckpointError, match="another worker did not store"):
        peers.done_file(str(tmp_path / "rank-0001.json"), save_id="x")


def test_an_error_in_the_block_is_not_replaced_by_one_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str, tensors: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(store, "write_shard", broken)
    model, optimizer = make()

    def train() -> None:
        with Checkpointer(str(tmp_path), keep=1, workers=Workers(0, 0, 1, torch.device("cpu"))) as checkpointer:
            checkpointer.save(1, model=model, optimizer=optimizer, trainer_state={})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
