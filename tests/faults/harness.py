"""Real drivers as processes, and what a test may ask of the run that they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydist.core import storage
from raydist.tracking import server
from raydist.tracking.find import list_runs
from raydist.tracking.jsonl import Curve, read_curve, read_records
from tests.servers.processes import wait_until
from tests.training.cases import recipe_values

DRIVER_TIMEOUT_S = 400.0
_POLL_S, _POLL_BUCKET_S = 0.05, 0.5

# Two workers and steps of a few milliseconds; whatever is silent for 30 s counts as failed.
FAULT_RUN: dict[str, Any] = {
    "scaling.num_workers": 2,
    "scaling.collective_timeout_s": 30,
    "scaling.max_failures": 9,
    "training.validate_every_steps": "null",
    "training.num_steps": 400,
    "training.learning_rate_schedule.name": "constant",
    "checkpoint.every_steps": 25,
    "tracking.mlflow_uri": "null",
}


class Driver:
    """One ``raydist train`` process.

    Args:
        recipe: the YAML file.
        arguments: more words of the command line.
        where: words before the command, e.g. of a network namespace.
        environment: of the process.
    """

    def __init__(
        self, recipe: Path, *arguments: str, where: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        command = [*where, sys.executable, "-m", "raydist.cli.main", "train", str(recipe), "--json", *arguments]
        self.run_dir = run_dir_of(recipe)
        self._output = recipe.with_name(f"driver-{time.time_ns()}.log")
        with self._output.open("wb") as stream:
            self.process = subprocess.Popen(
                command, env=dict(environment or os.environ), stdout=stream, stderr=subprocess.STDOUT
            )

    @property
    def poll_s(self) -> float:
        """How often to look at the run directory; in a bucket that costs the run something."""
        return _POLL_BUCKET_S if storage.is_remote(self.run_dir) else _POLL_S

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._output.read_text(errors="replace")

    def result(self) -> dict[str, Any]:
        """Waits for the end; the JSON object of the last line."""
        assert self.wait() == 0, self.output
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        value: dict[str, Any] = json.loads(self.output.strip().splitlines()[-1])
        return value

    def wait(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout=DRIVER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver did not end:\n{self.output}") from None

    def wait_for_step(self, step: int) -> None:
        """Returns when the step is in ``metrics.jsonl``."""
        wait_until(
            lambda: self._is_at(step),
            timeout_s=DRIVER_TIMEOUT_S,
            what=f"step {step}; the driver's words:\n{self.output}",
            poll_s=self.poll_s,
        )

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self.process.send_signal(signal.SIGTERM)

    def _is_at(self, step: int) -> bool:
        assert self.process.poll() is None or last_step(self.run_dir) >= step, self.output
        return last_step(self.run_dir) >= step


def write_recipe(folder: Path, dataset: str, *, runs: str | None = None, **changes: Any) -> Path:
    """A recipe file whose run directory lies in ``runs``, or else in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "case.yaml"
    values = recipe_values(dataset, folder / "runs", **changes)
    path.write_text(yaml.safe_dump({**values, "output_dir": runs or values["output_dir"]}))
    return path


def run_dir_of(recipe: Path) -> str:
    """Where the run of a recipe of :func:`write_recipe` lies."""
    values = yaml.safe_load(recipe.read_text())
    return storage.join(values["output_dir"], values["name"])


def records(run_dir: str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that carry a loss; none where there is no file yet."""
    return [record for record in read_records(f"{run_dir}/metrics.jsonl") if "loss" in record]


def last_step(run_dir: str) -> int:
    """The newest step in ``metrics.jsonl``, of whatever attempt."""
    lines = records(run_dir)
    return int(lines[-1]["step"]) if lines else 0


def loss_curve(run_dir: str) -> Curve:
    """The loss of every step, each step once."""
    return read_curve(f"{run_dir}/metrics.jsonl")["loss"]


class Recovery:
    """Measures one fault: construct it right before, :meth:`wait` until the run has gone on.

    Args:
        driver: of the run.

    Attributes:
        steps_lost: steps that were done and had to be done again.
        seconds: from the fault to the end of the first step after it.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._at = time.time()
        self._attempt = records(driver.run_dir)[-1]["attempt"]
        self.steps_lost = 0
        self.seconds = 0.0

    @property
    def figures(self) -> dict[str, Any]:
        """For ``record_fault``."""
        return {"steps_lost": self.steps_lost, "recovery_s": self.seconds}

    def wait(self, driver: Driver | None = None) -> None:
        """Returns when a later attempt has logged a step; ``driver`` where another one has taken over."""
        driver = driver or self._driver

        def has_gone_on() -> bool:
            assert driver.process.poll() is None or self._later(), driver.output
            return bool(self._later())

        what = "the run goes on after the fault"
        wait_until(has_gone_on, timeout_s=DRIVER_TIMEOUT_S, what=what, poll_s=driver.poll_s)
        first = self._later()[0]
        before = [record["step"] for record in records(driver.run_dir) if record["attempt"] == self._attempt]
        self.steps_lost = max(before) - (first["step"] - 1)
        self.seconds = first["time"] - self._at

    def _later(self) -> list[dict[str, Any]]:
        return [record for record in records(self._driver.run_dir) if record["attempt"] > self._attempt]


def assert_one_finished_run(
    run_dir: str,
    *,
    uri: str,
    curve: Curve,
    status: str = "FINISHED",
    rounding: float = 0.0,
    experiment: str = "raydist",
) -> None:
    """MLflow has exactly one run, ended rightly, with every step once.

    It keeps the first value of a step that was done twice; ``rounding`` is how far the second may be from it, where the
    number of workers changed in between.
    """
    runs = list_runs(uri, experiment=experiment)
    assert [(run.name, run.status) for run in runs] == [(Path(run_dir).name, status)]
    history = server.connect(uri).get_metric_history(runs[0].run_id, "loss")
    assert [point.step for point in history] == [step for step, _ in curve], "a step is in MLflow twice, or missing"
    assert [point.value for point in history] == pytest.approx([loss for _, loss in curve], rel=0, abs=rounding)


def assert_finished(driver: Driver, *, curve: Curve) -> None:
    """The run ended by itself with this loss in every step, bit for bit, is in MLflow once, and left nothing over."""
    result = driver.result()
    assert result["step"] == len(curve)
    assert loss_curve(driver.run_dir) == curve
    assert_one_finished_run(driver.run_dir, uri=result["mlflow_uri"], curve=curve)
    assert_nothing_left_over(driver.run_dir)


def assert_nothing_left_over(run_dir: str) -> None:
    """No temporary file and no half checkpoint in the run directory, and no lease that is held."""
    checkpoints = storage.join(run_dir, "checkpoints")
    steps = [name for name in storage.list_names(checkpoints) if name.startswith("step-")]
    names = [*storage.list_files(run_dir), *steps]
    assert not [name for name in names if ".partial-" in name or ".deleted-" in name]
    assert steps
    assert [step for step in steps if not storage.exists(storage.join(checkpoints, step, "complete.json"))] == []
    assert storage.read_json(storage.join(run_dir, "driver.json"))["ended"]
