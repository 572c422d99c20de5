"""The live display of a run: a bar with step, loss, tokens/s and time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from raydist.core.units import format_count, format_duration
from raydist.training.hooks import Hook, RunFacts

_LINE_EVERY_S = 10.0


class ProgressDisplay(Hook):
    """Shows rank 0's log lines; survives restarts of the workers, which begin with ``on_start`` again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._facts: RunFacts | None = None
        self._printed_at = 0.0

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def on_start(self, facts: RunFacts) -> None:
        """Says what starts, or that it goes on."""
        if facts.start_step:
            self._print(f"going on at step {facts.start_step} of {facts.num_steps}, {_workers(facts)}")
        else:
            self._print(
                f"{facts.name}: {format_count(float(facts.num_parameters))} parameters, {_workers(facts)}, "
                f"{facts.num_steps} steps of {format_count(float(facts.tokens_per_step))} tokens"
            )
        self._facts = facts
        if self._task is None:
            self._task = self._bar.add_task("training", total=facts.num_steps, numbers="")
        self._bar.update(self._task, completed=facts.start_step)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar; without a terminal prints a line now and then, and always the last one."""
        assert self._facts is not None
        numbers = "  ".join(_numbers(metrics))
        if self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        is_last = step == self._facts.num_steps
        if not self._live and (is_last or time.monotonic() - self._printed_at > _LINE_EVERY_S):
            self._printed_at = time.monotonic()
            left_s = (self._facts.num_steps - step) * metrics.get("step_s", 0.0)
            eta = "" if is_last else f"  {format_duration(left_s)} left"
            self._print(f"step {step:>5}/{self._facts.num_steps}  {numbers}{eta}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


def _workers(facts: RunFacts) -> str:
    return f"{facts.world_size} worker{'s' if facts.world_size > 1 else ''}"


def _numbers(metrics: Mapping[str, float]) -> list[str]:
    shown = [("loss", "loss"), *((f"loss/{name}", name) for name in _terms(metrics)), ("validation/loss", "validation")]
    parts = [f"{label} {metrics[key]:.3f}" for key, label in shown if key in metrics]
    if "tokens_per_s" in metrics:
        parts.append(f"{format_count(metrics['tokens_per_s'])} tokens/s")
    return parts


def _terms(metrics: Mapping[str, float]) -> list[str]:
    return [key.removeprefix("loss/") for key in metrics if key.startswith("loss/")]
