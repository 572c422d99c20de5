"""A notice to stop, at every place where it may come: what is saved, what is logged, and that nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raydist.checkpoint import checkpointer
from raydist.checkpoint.checkpointer import Checkpointer
from raydist.checkpoint.layout import complete_checkpoints, newest_complete
from raydist.checkpoint.schedule import SaveSchedule
from raydist.config.load import Recipe
from raydist.core.dist import Workers
from raydist.tracking.jsonl import read_curve, read_records
from raydist.training.hooks import Hook
from raydist.training.loop import TrainLoop
from raydist.training.preemption import StopNotice, sigterm_notice
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import Outcome, run_attempt
from tests.training.cases import recipe_of, undisturbed_curves

CHANGES = {
    "training.num_steps": 8,
    "training.validate_every_steps": 4,
    "training.validation_batches": 3,
    "checkpoint.every_steps": 100,
    "model.overrides.num_layers": 1,
}


@pytest.fixture(scope="module")
def whole(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The curves of a run that nobody disturbs."""
    return undisturbed_curves(recipe_of(dataset, tmp_path_factory.mktemp("whole"), **CHANGES))


def assert_same_curves(run_dir: str, whole: dict[str, Any]) -> None:
    found = read_curve(f"{run_dir}/metrics.jsonl")
    for name in ("loss", "grad_norm", "validation/loss"):
        assert found[name] == whole[name], name  # bit for bit
    seen = [record["step"] for record in read_records(f"{run_dir}/metrics.jsonl") if "loss" in record]
    assert seen == sorted(set(seen)), "a step was logged twice"


# The notice is asked for once at each step's start and once before each batch of a validation: 4 steps, 3 batches, 4 steps.
@pytest.mark.parametrize(("call", "step"), [(1, 1), (3, 3), (4, 4), (5, 4), (7, 4), (8, 5), (11, 8), (12, 8), (14, 8)])
def test_every_call_that_gives_notice_saves_and_the_run_goes_on_bit_for_bit(
    dataset: str, tmp_path: Path, whole: dict[str, Any], call: int, step: int
) -> None:
    calls = iter(range(1, 1000))
    recipe = recipe_of(dataset, tmp_path, **CHANGES)
    run_dir = prepare_run_dir(recipe, resume=False)
    outcome = run_attempt(recipe, run_dir=run_dir, notice=lambda: "drained" if next(calls) >= call else None)
    assert (outcome.interrupted, outcome.step) == (True, step)
    newest = newest_complete(run_dir)
    assert newest is not None
    assert newest.step == step
    assert not (Path(run_dir) / "export").exists()
    again = run_attempt(recipe, run_dir=run_dir)
    assert (again.interrupted, again.step) == (False, 8)
    assert (Path(run_dir) / "export" / "model.safetensors").exists()
    assert_same_curves(run_dir, whole)


def test_a_notice_in_the_validation_that_is_made_up_for_interrupts_again(
    dataset: str, tmp_path: Path, whole: dict[str, Any]
) -> None:
    recipe = recipe_of(dataset, tmp_path, **CHANGES)
    run_dir = prepare_run_dir(recipe, resume=False)
    for first in (5, 2):
        calls = iter(range(1, 1000))
        outcome = run_attempt(
            recipe, run_dir=run_dir, notice=lambda calls=calls, first=first: "x" if next(calls) >= first else None
        )
        assert (outcome.interrupted, outcome.step) == (True, 4)
    run_attempt(recipe, run_dir=run_dir)
    assert_same_curves(run_dir, whole)


def test_sigterm_is_a_notice_once_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_notice() as notice:
        assert notice() is None
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice() == "received SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_no_handler_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def enter() -> None:
        with sigterm_notice() as notice:
            seen.extend([signal.getsignal(signal.SIGTERM), notice()])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before, None]


def test_a_notice_is_not_taken_back() -> None:
    answers: Iterator[str | None] = iter([None, "first", None])
    notice = StopNotice(lambda: None, lambda: next(answers))
    assert [notice(), notice(), notice()] == [None, "first", "first"]


class Stored(Hook):
    """Which checkpoints were handed over and which were stored, and in which thread that was said."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.stored: dict[int, float] = {}
        self.threads: set[threading.Thread] = set()

    def on_checkpoint(self, step: int) -> None:
        self.begun.append(step)

    def on_stored(self, step: int, upload_s: float) -> None:
        assert step in self.begun
        self.stored[step] = upload_s
        self.threads.add(threading.current_thread())


def attempt(recipe: Recipe, *hooks: Hook) -> tuple[str, Outcome]:
    run_dir = prepare_run_dir(recipe, resume=False)
    return run_dir, run_attempt(recipe, run_dir=run_dir, hooks=hooks)


def test_every_stored_checkpoint_is_reported_with_its_upload_time(dataset: str, tmp_path: Path) -> None:
    hook = Stored()
    changes = {**CHANGES, "checkpoint.every_steps": 3, "checkpoint.keep": 1, "checkpoint.keep_every_steps": 4}
    run_dir, _ = attempt(recipe_of(dataset, tmp_path, **changes), hook)
    assert hook.begun == list(hook.stored) == [3, 4, 6, 8]
    assert all(upload_s > 0 for upload_s in hook.stored.values())
    assert hook.threads == {threading.main_thread()}
    uploads = dict(read_curve(f"{run_dir}/metrics.jsonl")["checkpoint/upload_s"])
    assert uploads == pytest.approx(hook.stored)
    assert [checkpoint.step for checkpoint in complete_checkpoints(run_dir)] == [4, 8]


def test_a_run_is_saved_when_rank_0_finds_that_too_much_time_has_passed(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    class SlowSteps(Hook):
        def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
            now_s[0] += 30.0

    now_s = [0.0]
    made = SaveSchedule.__init__
    monkeypatch.setattr(SaveSchedule, "__init__", lambda self, **kw: made(self, **kw, clock=lambda: now_s[0]))
    hook = Stored()
    changes = {**CHANGES, "checkpoint.every_steps": "null", "checkpoint.every_minutes": 1.0, "checkpoint.keep": 9}
    # A step takes 30 s and asks at its start, so the third after a save finds a minute passed.
    run_dir, _ = attempt(recipe_of(dataset, tmp_path, **changes), hook, SlowSteps())
    assert hook.begun == [3, 6, 8]
    assert_same_curves(run_dir, whole)


def test_no_time_based_save_is_asked_for_while_one_is_in_flight(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, save = checkpointer.store, Checkpointer.save
    in_flight: list[tuple[int, bool]] = []

    def slow_store(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)
        store(*args, **kwargs)

    def watched_save(self: Checkpointer, step: int, **kwargs: Any) -> Any:
        in_flight.append((step, self.busy))
        return save(self, step, **kwargs)

    monkeypatch.setattr(checkpointer, "store", slow_store)
    monkeypatch.setattr(Checkpointer, "save", watched_save)
    changes = {**CHANGES, "training.num_steps": 40, "training.validate_every_steps": "null"}
    attempt(
        recipe_of(dataset, tmp_path, **{**changes, "checkpoint.every_steps": "null", "checkpoint.every_minutes": 1e-9})
    )
    assert [step for step, _ in in_flight][-1] == 40
    assert 2 < len(in_flight) < 40
    assert not any(busy for step, busy in in_flight if step < 40)


@pytest.mark.parametrize(
    ("rank", "busy", "has_failed", "overdue", "wanted"),
    [
        (0, False, False, True, True),
        (0, False, False, False, False),
        (0, True, False, True, False),  # rank 0 waits for the others' shards
        (1, False, False, True, False),
        (1, False, True, True, True),  # and this one will not come
        (1, False, True, False, False),
    ],
)
def test_who_asks_for_a_time_based_save(rank: int, busy: bool, has_failed: bool, overdue: bool, wanted: bool) -> None:
    loop = object.__new__(TrainLoop)
    loop.workers = Workers(rank, rank, 2, torch.device("cpu"))
    loop.checkpointer = SimpleNamespace(busy=busy, has_failed=has_failed)  # type: ignore[assignment]
    loop.schedule = SimpleNamespace(is_overdue=lambda: overdue)  # type: ignore[assignment]
    loop.notice = lambda: None
    assert list(loop._wishes()) == [0.0, float(wanted)]
