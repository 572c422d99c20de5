"""What a person sees of a run on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from raydist.cli.progress import ProgressDisplay
from raydist.training.hooks import RunFacts

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FACTS = RunFacts(
    name="small", num_steps=100, start_step=0, num_parameters=2_000_000, tokens_per_step=4096, world_size=2
)


@pytest.fixture
def now() -> list[float]:
    """The console's clock, which the test moves."""
    return [0.0]


@pytest.fixture
def terminal(now: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[Console, io.StringIO]:
    monkeypatch.setenv("TERM", "xterm-256color")
    output = io.StringIO()
    return Console(file=output, force_terminal=True, width=140, legacy_windows=False, get_time=lambda: now[0]), output


def last_bar(output: io.StringIO) -> str:
    """The bar as it was drawn last."""
    text = _ESCAPES.sub("", output.getvalue()).replace("\r", "\n")
    return [line for line in text.splitlines() if line.startswith("training")][-1].rstrip()


def test_a_terminal_shows_step_loss_speed_and_time_left(
    terminal: tuple[Console, io.StringIO], now: list[float]
) -> None:
    console, output = terminal
    with ProgressDisplay(console) as display:
        display.on_start(FACTS)
        for step in (10, 20):
            now[0] += 10.0  # a step a second
            display.on_log(step, {"loss": 2.5 - step / 100, "loss/ntp": 1.25, "tokens_per_s": 4096.0, "step_s": 1.0})
    shown = _ESCAPES.sub("", output.getvalue())
    assert "small: 2M parameters, 2 workers, 100 steps of 4.1k tokens" in shown
    assert re.fullmatch(r"training \S+ *20/100 +loss 2\.300  ntp 1\.250  4\.1k tokens/s +0:01:20", last_bar(output)), (
        last_bar(output)
    )
    assert "step    20/100" not in shown, "lines are for where there is no terminal"


def test_a_restart_sets_the_bar_back(terminal: tuple[Console, io.StringIO], now: list[float]) -> None:
    console, output = terminal
    with ProgressDisplay(console) as display:
        display.on_start(FACTS)
        now[0] += 10.0
        display.on_log(20, {"loss": 2.0})
        display.on_start(RunFacts(**{**vars(FACTS), "start_step": 15}))
    assert "going on at step 15 of 100, 2 workers" in _ESCAPES.sub("", output.getvalue())
    assert "15/100" in last_bar(output)
