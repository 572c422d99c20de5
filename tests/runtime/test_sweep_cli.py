"""``raydist sweep`` as a user runs it, against a running cluster: the live table, Ctrl-C, and what is left then."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray
from rich.console import Console

from raydist.cli.main import main
from raydist.cli.sweep_table import SweepDisplay
from raydist.evaluation.sweep_records import Goal, TrialRecord
from tests.runtime.sweeps import (
    METRIC,
    RATE,
    actors,
    assert_nothing_left,
    attempts,
    is_in_the_middle,
    lines,
    wait_for,
    write_sweep,
)
from tests.training.cases import quiet_environment

CTRL_C = b"\x03"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command on a terminal of its own, 160 columns wide."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**quiet_environment(), "COLUMNS": "160", "LINES": "50", "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: _make_controlling(0),
        )
        os.close(slave)
        self._output = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        """All that was shown, without colours and cursor movements."""
        return _ESCAPES.sub("", self._output.decode(errors="replace")).replace("\r", "")

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def wait(self) -> int:
        code = self.process.wait(timeout=300)
        self._reader.join(timeout=30)
        return code

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self._output += data


def _make_controlling(descriptor: int) -> None:
    """In the child: Ctrl-C on this terminal is for it."""
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.mark.ray
def test_ctrl_c_on_a_terminal_then_resume(others: set[str], dataset: str, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, dataset, space={RATE: [1e-3, 3e-3, 1e-2, 2e-2]}, budget={"num_steps": 100})
    folder = tmp_path / "out" / "rates"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "raydist.cli.main", "sweep", path, "--address", address]
    terminal = Terminal(*command)
    try:
        wait_for(lambda: is_in_the_middle(folder) or terminal.process.poll() is not None)
        terminal.type(CTRL_C)
        assert terminal.wait() == 130, terminal.text[-3000:]
    finally:
        terminal.process.kill()
    shown = terminal.text
    assert "Traceback" not in shown
    assert f"rates: {int(ray.cluster_resources()['CPU'])} trials at a time" in shown
    headers = [line.split() for line in shown.splitlines() if "trial" in line and "state" in line]
    assert headers[-1] == ["#", "trial", "learning_rate", "step", "loss/ntp", "state", "time"]
    rows = re.findall(r"(rates-\d+) +(\S+) +(\d+) +([\d.]+) +running", shown)
    steps = {name: {int(step) for other, _, step, _ in rows if other == name} for name, *_ in rows}
    assert any(len(seen) > 1 for seen in steps.values()), f"the table did not move: {shown[-3000:]}"
    assert f"interrupted; to go on: raydist sweep {path} --address {address} --resume" in " ".join(shown.split())
    assert_nothing_left(others=others)

    before = lines(folder)
    ended = {line["name"] for line in before if line["state"] == "finished"}
    interrupted = {line["name"] for line in before} - ended
    resumed = subprocess.run(
        [*command, "--resume", "--json"], env=quiet_environment(), capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    result = json.loads(resumed.stdout.splitlines()[-1])
    assert [trial["state"] for trial in result["trials"]] == ["finished"] * 4
    assert not ended & {line["name"] for line in lines(folder)[len(before) :]}, "a finished trial was repeated"
    assert any(len(attempts(folder, name)) > 1 for name in interrupted), "no trial went on from its checkpoint"
    assert_nothing_left(others=others)
    assert set(actors()) <= others


def test_the_table_shows_every_trial_with_its_state_and_says_why_one_failed() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=140, legacy_windows=False)
    records = [
        TrialRecord("s-000", {RATE: 1e-3}, "finished", {METRIC: [(4, 2.5), (8, 2.25)]}, num_steps=8, seconds=12),
        TrialRecord("s-001", {RATE: 3e-3}, "running", {METRIC: [(4, 2.75)]}, num_steps=6, seconds=5),
        TrialRecord("s-002", {RATE: 1e-1}, "failed", {}, num_steps=1, seconds=3),
    ]
    with SweepDisplay(console, name="s", goals=[Goal(METRIC)]) as display:
        display.on_plan(at_once=2, text="2 trials at a time on 2 CPUs on 1 node(s)")
        display.on_change(records)
        display.on_end(records[2], failure="the loss is not a number\nwhere: step 1")
    shown = _ESCAPES.sub("", output.getvalue()).replace("\r", "")
    assert "s: 2 trials at a time on 2 CPUs" in shown
    assert "s: 1 failed, 1 finished, 1 running after" in shown
    rows = {line.split()[1] if line.split()[0] == "1" else line.split()[0]: line.split() for line in shown.splitlines()
            if re.search(r"s-00\d +\d", line)}  # fmt: skip
    assert rows["s-000"] == ["1", "s-000", "1e-3", "8", "2.25", "finished", "12s"]
    assert rows["s-001"] == ["s-001", "3e-3", "6", "2.75", "running", "5.00s"]
    assert rows["s-002"][-2] == "failed"
    assert "s-002 failed at step 1    the loss is not a number" in shown
    assert "where: step 1" not in shown


BAD = {
    "unknown key": ({"space": {"training.optimizer.learnin_rate": [1e-3]}}, "learning_rate"),
    "empty space": ({"space": {}}, "space"),
    "empty choice": ({"space": {RATE: []}}, RATE),
    "metric that no objective reports": ({"metric": "validation/loss/perplexity"}, "validation/loss/ntp"),
    "unfair metric": ({"metric": "validation/loss"}, "unfair"),
    "resources that no node has": ({"recipe": {"scaling.cpus_per_worker": 1000}}, "1 workers of 1000 CPU"),
    "condition that never holds": (
        {"space": {RATE: {"choice": [1e-3], "when": {"objective.name": "masked"}}}},
        "never holds",
    ),
    "name in use": ({"name": "taken"}, "name=taken-2"),
}


@pytest.mark.ray
@pytest.mark.parametrize("case", BAD)
def test_a_bad_sweep_is_one_screen(
    others: set[str], dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    sections, word = BAD[case]
    (tmp_path / "out" / "taken" / "mine").mkdir(parents=True)
    path = write_sweep(tmp_path, dataset, **{"space": {RATE: [1e-3]}, **sections})
    assert main(["sweep", path, "--json"]) == 2
    captured = capsys.readouterr()
    screen = captured.err
    assert word in screen
    assert "Traceback" not in screen
    assert len(screen.splitlines()) <= 24
    assert all(len(line) <= 400 for line in screen.splitlines())
    error = json.loads(captured.out.splitlines()[-1])
    assert error["error"] in ("ConfigError", "CapacityError", "ResumeError")
    assert error["where"]
    assert error["fix"] or error["expected"], "it does not say what to do"
    assert os.listdir(tmp_path / "out") == ["taken"], "a refused sweep must leave its name free"
    assert set(actors()) <= others


def test_a_sampler_sweep_without_its_model_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "sweeps/sampler_pareto.yaml", "checkpoint=not-trained", "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (error["where"], error["found"]) == ("checkpoint in sweeps/sampler_pareto.yaml", "not-trained")
    assert "train it" in error["fix"]
