"""The live table of a sweep; where there is no terminal, a line when a trial ends and a summary now and then."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raydist.core.units import format_duration
from raydist.evaluation.sweep_records import Goal, TrialRecord, final_value
from raydist.evaluation.sweep_report import ranking_table
from raydist.runtime.sweep_view import SweepView

_LINE_EVERY_S = 15.0
_MOST_ROWS = 40


class SweepDisplay(SweepView):
    """Shows the trials of a sweep while it runs.

    Args:
        console: where to.
        name: of the sweep.
        goals: its metrics.
    """

    def __init__(self, console: Console, *, name: str, goals: Sequence[Goal]) -> None:
        self._console = console
        self._name = name
        self._goals = list(goals)
        self._started = time.monotonic()
        self._printed_at = 0.0
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        self.has_begun = False

    def __enter__(self) -> SweepDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_plan(self, *, at_once: int, text: str) -> None:
        """Says how many trials run at a time."""
        self.has_begun = True
        self._print(f"{self._name}: {text}")

    def on_change(self, records: Sequence[TrialRecord]) -> None:
        """Draws the table anew, or prints a line if the last is old."""
        if self._live is not None:
            self._live.update(self._table(records))
        elif time.monotonic() - self._printed_at > _LINE_EVERY_S:
            running = [f"{record.name} step {record.num_steps}" for record in records if record.state == "running"]
            self._print(f"{self._summary(records)}: {', '.join(running)}")

    def on_end(self, record: TrialRecord, *, failure: str) -> None:
        """Prints what came of a trial."""
        if self._live is None or failure:
            values = [(goal.metric, final_value(record, goal.metric)) for goal in self._goals]
            shown = "  ".join(f"{name} {value:.5g}" for name, value in values if value is not None)
            reason = f"  {failure.splitlines()[0][:160]}" if failure else ""
            self._print(f"{record.name} {record.state} at step {record.num_steps}  {shown}{reason}")

    def _table(self, records: Sequence[TrialRecord]) -> Table:
        ranking = ranking_table(records, self._goals)
        grid = Table(title=f"{self._name}: {self._summary(records)}", title_justify="left", box=box.SIMPLE)
        for name in ranking.columns:
            grid.add_column(name)
        for row in ranking.rows[:_MOST_ROWS]:
            grid.add_row(*[Text(cell(value)) for value in row])
        return grid

    def _summary(self, records: Sequence[TrialRecord]) -> str:
        counts = Counter(record.state for record in records)
        words = [f"{count} {state}" for state, count in sorted(counts.items())]
        return f"{', '.join(words) or 'starting'} after {format_duration(time.monotonic() - self._started)}"

    def _print(self, text: str) -> None:
        self._printed_at = time.monotonic()
        self._console.print(text, markup=False, highlight=False)


def cell(value: object) -> str:
    """A value of the ranking; five digits, as good trials are often close."""
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)
