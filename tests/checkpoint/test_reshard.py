"""Saves by 1 and 2 workers, each loaded by 1 and 2."""

import json
from pathlib import Path

import pytest

from raydist.checkpoint import store
from raydist.checkpoint.checkpointer import Checkpointer
from raydist.checkpoint.layout import newest_complete
from raydist.core.dist import Workers
from raydist.core.errors import CheckpointError, ResumeError
from tests.checkpoint.cases import check_loads_as, make, save_as
from tests.fsdp_utils.workers import run_alone, run_workers


def _two_workers(workers: Workers, folder: str) -> None:
    save_as(workers, f"{folder}/by2", f"{folder}/by2.safetensors")
    check_loads_as(workers, f"{folder}/by2", f"{folder}/by2.safetensors")
    check_loads_as(workers, f"{folder}/by1", f"{folder}/by1.safetensors")
    _failure_is_seen_by_all(workers, folder)
    _the_end_of_one_is_the_end_of_all(workers, folder)


def _failure_is_seen_by_all(workers: Workers, folder: str) -> None:
    """Worker 1 cannot write: no marker appears, both go on, the next save succeeds; failing at the end is an error."""
    model, optimizer = make(workers)
    checkpointer = Checkpointer(f"{folder}/failing", keep=2, workers=workers)
    healthy = store.write_shard
    if workers.rank == 1:

        def broken(path: str, tensors: object) -> None:
            raise OSError("no space left on device")

        store.write_shard = broken
    checkpointer.save(1, model=model, optimizer=optimizer, trainer_state={})
    with pytest.raises(CheckpointError, match="stor"):
        checkpointer.wait()
    (result,) = checkpointer.take_results()
    assert result.error is not None
    assert newest_complete(f"{folder}/failing") is None
    store.write_shard = healthy
    checkpointer.save(2, model=model, optimizer=optimizer, trainer_state={})
    checkpointer.close()
    (result,) = checkpointer.take_results()
    assert result.error is None
    newest = newest_complete(f"{folder}/failing")
    assert newest is not None
    assert newest.step == 2


def _the_end_of_one_is_the_end_of_all(workers: Workers, folder: str) -> None:
    """Worker 1 sees that the run is another driver's, after the first save: nothing more is stored, both end."""
    model, optimizer = make(workers)
    ours = [True]
    checkpointer = Checkpointer(f"{folder}/lost", keep=2, workers=workers, is_ours=lambda: ours[0] or workers.rank == 0)
    checkpointer.save(1, model=model, optimizer=optimizer, trainer_state={})
    checkpointer.wait()
    ours[0] = False
    checkpointer.save(2, model=model, optimizer=optimizer, trainer_state={})
    with pytest.raises(ResumeError, match="taken this run over"), checkpointer:
        checkpointer.save(3, model=model, optimizer=optimizer, trainer_state={})
    newest = newest_complete(f"{folder}/lost")
    assert newest is not None
    assert newest.step == 1
    assert not Path(f"{folder}/lost/checkpoints/step-00000002/rank-0001.json").exists()
    assert not Path(f"{folder}/lost/checkpoints/step-00000003").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("runs")
    run_alone(save_as, f"{root}/by1", f"{root}/by1.safetensors")
    run_workers(_two_workers, str(root), world_size=2, store_path=f"{root}/store")
    return str(root)


def test_two_workers_to_one_is_bitwise(folder: str) -> None:
    run_alone(check_loads_as, f"{folder}/by2", f"{folder}/by2.safetensors")


def test_one_worker_to_one_is_bitwise(folder: str) -> None:
    run_alone(check_loads_as, f"{folder}/by1", f"{folder}/by1.safetensors")


def test_each_worker_writes_its_own_rows_and_nothing_is_written_twice(folder: str) -> None:
    found = {}
    for name in ("by1", "by2"):
        checkpoint = newest_complete(f"{folder}/{name}")
        assert checkpoint is not None
        found[name] = checkpoint
    assert [name for name in found["by2"].files if name.endswith("safetensors")] == [
        "rank-0000.safetensors",
        "rank-0001.safetensors",
    ]
    table = json.loads((Path(found["by2"].folder) / "metadata.json").read_text())["tensors"]
    for tensor in table.values():
        rows = [chunk["sizes"][0] for chunk in tensor["chunks"] if chunk["sizes"]]
        assert sum(rows) == (tensor["shape"][0] if tensor["shape"] else 0)
