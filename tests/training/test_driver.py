"""The MLflow run says how the training ended, whatever ended it."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from raydist.config.load import Recipe, read_resolved
from raydist.core import storage
from raydist.core.errors import DataError, ResumeError, StorageError
from raydist.tracking.find import find_run, list_runs
from raydist.tracking.mlflow_runs import RunHandle
from raydist.training import driver
from raydist.training.driver import RunAttempts, conduct
from raydist.training.lease import LEASE, DriverLease
from raydist.training.session import Outcome
from tests.training.cases import recipe_of


def status_of(recipe: Recipe) -> list[tuple[str, str]]:
    uri = f"sqlite:///{recipe.config.output_dir}/mlflow.db"
    return [(run.name, run.status) for run in list_runs(uri, experiment=recipe.config.tracking.experiment)]


def ending_in(*, interrupted: bool = False) -> RunAttempts:
    return lambda recipe, run_dir: Outcome(step=3, metrics={}, interrupted=interrupted)


def raising(error: BaseException) -> RunAttempts:
    def attempts(recipe: Recipe, run_dir: str) -> Outcome:
        raise error

    return attempts


@pytest.fixture
def recipe(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return recipe_of(dataset, tmp_path, **{"tracking.mlflow_uri": "null"})


def observed(act: RunAttempts, seen: list[list[tuple[str, str]]]) -> RunAttempts:
    """Notes the status while the run is under way."""

    def attempts(recipe: Recipe, run_dir: str) -> Outcome:
        seen.append(status_of(recipe))
        return act(recipe, run_dir)

    return attempts


def test_each_end_has_its_status_and_a_resume_sets_it_anew(recipe: Recipe) -> None:
    ends: list[tuple[RunAttempts, type[BaseException] | None, str]] = [
        (raising(DataError("broken")), DataError, "FAILED"),
        (raising(KeyboardInterrupt()), KeyboardInterrupt, "KILLED"),
        (raising(SystemExit(15)), SystemExit, "KILLED"),
        (raising(ValueError("a bug")), ValueError, "FAILED"),
        (ending_in(interrupted=True), None, "KILLED"),
        (ending_in(), None, "FINISHED"),
    ]
    for number, (act, error, status) in enumerate(ends):
        seen: list[list[tuple[str, str]]] = []
        with pytest.raises(error) if error else nullcontext():
            conduct(recipe, resume=number > 0, attempts=observed(act, seen))
        assert seen == [[("run", "RUNNING")]]
        assert status_of(recipe) == [("run", status)]


def test_the_run_names_its_configuration(recipe: Recipe) -> None:
    run_dir, _, _ = conduct(recipe, resume=False, attempts=ending_in())
    assert find_run(run_dir).tags["raydist.config_hash"] == recipe.config_hash


def away(*_: object, **__: object) -> None:
    raise StorageError("the bucket cannot be reached")


def test_a_trained_run_is_finished_without_its_pointer(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "newest_complete", away)
    conduct(recipe, resume=False, attempts=ending_in())
    assert status_of(recipe) == [("run", "FINISHED")]
    assert "where the newest checkpoint lies: StorageError: the bucket cannot be reached" in caplog.text


def test_why_a_run_failed_is_not_hidden_by_storage_that_is_away(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RunHandle, "finish", away)
    for number, error in enumerate((DataError("broken"), KeyboardInterrupt())):
        with pytest.raises(type(error)):
            conduct(recipe, resume=number > 0, attempts=raising(error))
    assert "the run ended as FAILED: StorageError: the bucket cannot be reached" in caplog.text
    assert "the run ended as KILLED" in caplog.text


def test_a_resume_that_is_refused_leaves_the_configuration_of_the_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _, _ = conduct(recipe, resume=False, attempts=ending_in())
    config = Path(run_dir, "config.yaml")
    before = config.read_text()
    checkpoint = recipe.config.checkpoint.model_copy(update={"keep": 7})
    changed = Recipe(recipe.config.model_copy(update={"checkpoint": checkpoint}), recipe.config_hash, recipe.path)

    def refused(self: DriverLease) -> None:
        raise ResumeError("another driver is training this run")

    with monkeypatch.context() as patch:
        patch.setattr(DriverLease, "_wait_for_death", refused)
        with pytest.raises(ResumeError, match="another driver"):
            conduct(changed, resume=True, attempts=ending_in())
    assert config.read_text() == before
    conduct(changed, resume=True, attempts=ending_in())
    assert read_resolved(str(config)).config.checkpoint.keep == 7


def test_a_driver_that_lost_the_run_leaves_its_mlflow_run_to_the_other(recipe: Recipe) -> None:
    """It was frozen, and what ends it comes after another driver has begun."""

    def lost(recipe: Recipe, run_dir: str) -> Outcome:
        storage.write_json(f"{run_dir}/{LEASE}", {"id": "another", "time": time.time(), "beat": 1, "ended": False})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conduct(recipe, resume=False, attempts=lost)
    assert status_of(recipe) == [("run", "RUNNING")]
