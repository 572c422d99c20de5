"""What the tests of faults share: the records that the table of docs/reliability.md is made of."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from raydist.tracking.jsonl import Curve
from tests.faults.bucket_runs import SHORT_RUN
from tests.faults.harness import FAULT_RUN, loss_curve, run_dir_of, write_recipe
from tests.training.cases import quiet_environment, recipe_of, torchrun, undisturbed_curves, write_dataset

RECORDS_VARIABLE = "RAYDIST_FAULT_RECORDS"


@pytest.fixture(scope="session")
def record_fault(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """``record_fault(fault, outcome, *, steps_lost, recovery_s)``, called once a test has seen that the fault is survived.

    Each call appends one JSON object to the file that the environment's RAYDIST_FAULT_RECORDS names; without it the
    record goes into a folder of the test run.
    """
    named = os.environ.get(RECORDS_VARIABLE)
    path = Path(named) if named else tmp_path_factory.mktemp("faults") / "records.jsonl"

    def record(fault: str, outcome: str, *, steps_lost: int | None, recovery_s: float | None) -> None:
        seconds = None if recovery_s is None else round(recovery_s, 1)
        line = {"fault": fault, "outcome": outcome, "steps_lost": steps_lost, "recovery_s": seconds}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    return record


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def whole_curve(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The loss of an uninterrupted run on two workers."""
    changes = {"checkpoint.every_steps": 10_000, "scaling.collective_timeout_s": 600, "tracking.mlflow_uri": "none"}
    recipe = write_recipe(tmp_path_factory.mktemp("whole"), dataset, **{**FAULT_RUN, **changes})
    command = [*torchrun(2, "train", str(recipe), "--no-ray")]
    done = subprocess.run(command, env=quiet_environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    curve = loss_curve(run_dir_of(recipe))
    assert [step for step, _ in curve] == list(range(1, FAULT_RUN["training.num_steps"] + 1))
    return curve


@pytest.fixture(scope="session")
def whole_in_bucket(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """The curves of the uninterrupted ``SHORT_RUN``; it does not matter where it is stored."""
    return undisturbed_curves(recipe_of(dataset, tmp_path_factory.mktemp("whole-short"), **SHORT_RUN))
