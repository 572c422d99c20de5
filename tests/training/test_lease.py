from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from raydist.core import storage
from raydist.core.errors import ResumeError, StorageError
from raydist.tracking.jsonl import read_curve
from raydist.training import lease
from raydist.training.hooks import Hook
from raydist.training.lease import LEASE, DriverLease
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.processes import wait_until
from tests.training.cases import recipe_of

_HOLD = """
import sys, time
from raydist.training.lease import DriverLease
with DriverLease(sys.argv[1]):
    time.sleep(600)
"""


def test_one_driver_after_the_other(tmp_path: Path) -> None:
    for _ in range(2):
        with DriverLease(str(tmp_path)):
            assert not json.loads((tmp_path / LEASE).read_text())["ended"]
        assert json.loads((tmp_path / LEASE).read_text())["ended"]
    assert [path.name for path in tmp_path.iterdir()] == [LEASE]


def test_a_live_driver_is_not_joined_and_a_dead_one_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_DEAD_AFTER_S", 8.0)
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)])
    try:
        wait_until((tmp_path / LEASE).exists, timeout_s=60, what="the other process holds the lease")
        with pytest.raises(ResumeError, match=f"another driver is training this run[^~]*process {holder.pid} on"):
            DriverLease(str(tmp_path)).__enter__()
    finally:
        holder.kill()
        holder.wait()
    with DriverLease(str(tmp_path)):
        assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()


def test_a_lease_of_long_ago_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_DEAD_AFTER_S", 1e9)
    (tmp_path / LEASE).write_text(json.dumps({"id": "x", "pid": 1, "host": "h", "time": time.time() - 3600, "beat": 7}))
    with DriverLease(str(tmp_path)):
        assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"id": 3}', '{"id": "x", "time": "noon"}'])
def test_a_damaged_lease_holds_nobody_up(tmp_path: Path, content: str) -> None:
    (tmp_path / LEASE).write_text(content)
    with DriverLease(str(tmp_path)):
        assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()


def beats(run_dir: Path) -> int:
    path = run_dir / LEASE
    return json.loads(path.read_text())["beat"] if path.exists() else 0


_DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"


@pytest.mark.parametrize(
    ("script", "codes"), [(_HOLD, (-signal.SIGINT, 130, 1)), (_DEAF + _HOLD, (-signal.SIGTERM,))], ids=["", "deaf"]
)
def test_a_driver_that_lost_its_lease_ends(tmp_path: Path, script: str, codes: tuple[int, ...]) -> None:
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: beats(tmp_path) == 2, timeout_s=60, what="the other process has just renewed the lease")
        taken = json.dumps({"id": "another", "pid": 1, "host": "h", "time": time.time(), "beat": 1, "ended": False})
        (tmp_path / LEASE).write_text(taken)
        errors = holder.communicate(timeout=60)[1]
    finally:
        holder.kill()
        holder.wait()
    assert holder.returncode in codes
    assert "another driver has taken this run over" in errors
    assert (tmp_path / LEASE).read_text() == taken


def test_a_bucket_that_is_away_does_not_hold_up_the_end(
    bucket: str, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_PATIENCE_S", 0.5)
    held = DriverLease(f"{bucket}/run")
    held.__enter__()
    s3_proxy.refuse()
    end = threading.Thread(target=held.__exit__, args=(None, None, None), daemon=True)
    end.start()
    wait_until(lambda: not end.is_alive(), timeout_s=60, what="the lease is given up")
    s3_proxy.pass_all()
    assert not storage.read_json(f"{bucket}/run/{LEASE}")["ended"]


def test_workers_of_a_driver_that_lost_its_run_write_no_checkpoint_into_it(dataset: str, tmp_path: Path) -> None:
    """Another driver takes the run over at step 6; the save of step 8 stores nothing, and the next look at it ends them."""
    recipe = recipe_of(dataset, tmp_path, **{"checkpoint.every_steps": 4, "training.num_steps": 40})
    run_dir = prepare_run_dir(recipe, resume=False)
    (Path(run_dir) / LEASE).write_text(json.dumps({"id": "ours"}))

    class TakeOver(Hook):
        def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 6:
                (Path(run_dir) / LEASE).write_text(json.dumps({"id": "theirs"}))

    is_ours = functools.partial(lease.is_held, run_dir, "ours")
    with pytest.raises(ResumeError, match="another driver has taken this run over"):
        run_attempt(recipe, run_dir=run_dir, hooks=[TakeOver()], is_ours=is_ours)
    assert [path.name for path in sorted((Path(run_dir) / "checkpoints").iterdir())] == ["step-00000004"]
    assert list(read_curve(f"{run_dir}/metrics.jsonl")["loss"])[-1][0] == 12


def test_who_holds_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lease.holder_of(str(tmp_path)) is None
    assert lease.is_held(str(tmp_path), "a driver whose lease is being written")
    with DriverLease(str(tmp_path)) as held:
        assert held.is_held()
        assert not lease.is_held(str(tmp_path), "an earlier driver")

        def away(path: str) -> None:
            raise StorageError("the bucket cannot be reached")

        monkeypatch.setattr(lease.storage, "read_json", away)
        assert lease.is_held(str(tmp_path), "an earlier driver"), "who cannot look does not give up"
        monkeypatch.undo()
