"""The status file: a heartbeat, what the loop reports, and how a run ended."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from raydist.core import storage
from raydist.core.errors import DataError, RaydistError
from raydist.runtime.status import HEARTBEAT_S, STATUS, RunStatus, StatusWriter, read_status, submission_id
from raydist.training.hooks import RunFacts
from raydist.training.session import Outcome
from tests.servers.processes import wait_until

FACTS = RunFacts(name="run", num_steps=100, start_step=0, num_parameters=10, tokens_per_step=64, world_size=2)


def status_of(folder: Path) -> RunStatus:
    status = read_status(str(folder))
    assert status is not None
    return status


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "mlflow.json"), {"uri": "http://m:5000", "run_id": "abc"})
    with StatusWriter("run", run_dir=str(tmp_path), interval_s=0.02) as writer:
        wait_until(lambda: read_status(str(tmp_path)) is not None, timeout_s=20, what="a first status")
        assert status_of(tmp_path).state == "starting"
        writer.on_start(FACTS)
        writer.on_log(10, {"loss": 2.5, "tokens": 640.0, "tokens_per_s": 99.0, "mfu": 0.4, "other": 1.0})
        writer.on_checkpoint(10)
        wait_until(lambda: status_of(tmp_path).saving_step == 10, timeout_s=20, what="a save on its way")
        assert status_of(tmp_path).checkpoint_step is None
        writer.on_checkpoint(20)
        writer.on_stored(10, 1.5)
        wait_until(lambda: status_of(tmp_path).checkpoint_step == 10, timeout_s=20, what="a complete checkpoint")
        assert (status_of(tmp_path).saving_step, status_of(tmp_path).upload_s) == (20, 1.5)
        writer.on_save_failed(20)
        wait_until(lambda: status_of(tmp_path).failed_step == 20, timeout_s=20, what="a save that failed")
        assert (status_of(tmp_path).checkpoint_step, status_of(tmp_path).saving_step) == (10, None)
        writer.on_checkpoint(30)
        writer.on_stored(30, 2.5)
        wait_until(lambda: status_of(tmp_path).checkpoint_step == 30, timeout_s=20, what="a later checkpoint")
        assert status_of(tmp_path).failed_step is None
        before = status_of(tmp_path).updated_at
        wait_until(lambda: status_of(tmp_path).updated_at > before, timeout_s=20, what="another heartbeat")
        writer.end_with(Outcome(step=100, metrics={}))
    status = status_of(tmp_path)
    assert (status.state, status.step, status.num_steps, status.attempt) == ("finished", 100, 100, 1)
    assert (status.loss, status.tokens, status.tokens_per_s, status.mfu) == (2.5, 640.0, 99.0, 0.4)
    assert (status.checkpoint_step, status.saving_step) == (30, None)
    assert (status.mlflow_uri, status.mlflow_run_id) == ("http://m:5000", "abc")
    assert status.has_ended
    assert not status.is_stale(time.time() + 1e6)


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (DataError("a shard is damaged"), "failed", "DataError: a shard is damaged"),
        (KeyboardInterrupt(), "interrupted", None),
    ],
)
def test_how_it_ended(error: BaseException, state: str, message: str | None, tmp_path: Path) -> None:
    with pytest.raises(type(error)), StatusWriter("run", run_dir=str(tmp_path)):
        raise error
    assert (status_of(tmp_path).state, status_of(tmp_path).message) == (state, message)


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Outcome(step=7, metrics={}, interrupted=True), "interrupted"),
        (Outcome(step=7, metrics={}, stopped=True), "stopped"),
    ],
)
def test_ends_before_the_last_step(outcome: Outcome, state: str, tmp_path: Path) -> None:
    with StatusWriter("run", run_dir=str(tmp_path)) as writer:
        writer.end_with(outcome)
    assert (status_of(tmp_path).state, status_of(tmp_path).step) == (state, 7)


def test_a_second_attempt_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    with StatusWriter("run", run_dir=str(tmp_path)) as writer:
        writer.on_start(FACTS)
        writer.on_checkpoint(50)
        writer.on_start(RunFacts("run", 100, 40, 10, 64, 1))
    status = status_of(tmp_path)
    assert (status.attempt, status.step, status.checkpoint_step, status.saving_step) == (2, 40, 40, None)


def test_silence_is_noticed() -> None:
    status = RunStatus(name="run", run_dir="x", state="running", updated_at=1000.0)
    assert not status.is_stale(1000.0 + HEARTBEAT_S)
    assert status.is_stale(1000.0 + 10 * HEARTBEAT_S)
    assert status.heartbeat_age_s(999.0) == 0.0  # the reader's clock may be behind


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    with StatusWriter("run", run_dir=str(tmp_path)) as writer:
        writer.on_start(FACTS)
        writer.on_log(1, {"loss": float("nan"), "tokens_per_s": float("inf")})
    json.loads((tmp_path / STATUS).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert status_of(tmp_path).loss is None


def test_a_storage_that_refuses_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").write_text("a file where the run directory should be")
    with StatusWriter("run", run_dir=str(tmp_path / "run"), interval_s=0.01) as writer:
        writer.on_start(FACTS)
    assert (tmp_path / "run").read_text().startswith("a file")


@pytest.mark.parametrize(
    "failing",
    [
        pytest.param("write_json", id="a storage with errors of its own"),
        pytest.param("read_json", id="a record of MLflow's that cannot be read"),
    ],
)
def test_no_trouble_ends_the_heartbeat(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*unused: object) -> None:
        calls.append(failing)
        raise KeyError("NoSuchBucket")

    with StatusWriter("run", run_dir=str(tmp_path), interval_s=0.01) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(storage, failing, fail)
            seen = len(calls)
            wait_until(lambda: len(calls) > seen + 1, timeout_s=20, what="two heartbeats in trouble")
        writer.on_start(FACTS)
    status = status_of(tmp_path)
    assert (status.state, status.num_steps) == ("finished", 100)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        "\x00",
        *(
            json.dumps({"name": "x", "run_dir": "y", **wrong})
            for wrong in (
                {"updated_at": "z"}, {"mfu": "x"}, {"loss": [1]}, {"step": {}}, {"run_dir": 1}, {"state": "lost"},
                {"upload_s": float("nan")},
            )
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / STATUS).write_text(text)
    with pytest.raises(RaydistError, match="cannot be read"):
        read_status(str(tmp_path))


def test_keys_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / STATUS).write_text(json.dumps({"name": "x", "run_dir": "y", "new_key": 1}))
    assert status_of(tmp_path).name == "x"


def test_the_job_is_read_from_what_ray_hands_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert submission_id() is None
    for text, expected in (
        ("{", None),
        ("{}", None),
        ('{"metadata": {"job_submission_id": "raydist-x"}}', "raydist-x"),
    ):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
        assert submission_id() == expected
