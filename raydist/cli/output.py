"""What the verbs print. People read stdout; with ``--json`` people's text goes to stderr and stdout ends in one JSON object."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

EXIT_UNFINISHED = 75  # EX_TEMPFAIL: nothing is wrong and the work is not done; whoever started it may start it again
EXIT_FAILED = 2  # what a mistake ends with as well

_json_mode = False


def set_json_mode(enabled: bool) -> None:
    """Called once by the command line, before the verb runs."""
    global _json_mode
    _json_mode = enabled


def console() -> Console:
    """The console that human text goes to."""
    from rich.console import Console

    stream = sys.stderr if _json_mode else sys.stdout
    width = None if stream.isatty() else 120
    return Console(file=stream, highlight=False, soft_wrap=not stream.isatty(), width=width)


def say(text: str = "") -> None:
    """Prints text as it is."""
    console().print(text, markup=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """Prints aligned columns; numbers to the right."""
    from rich import box
    from rich.table import Table

    grid = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    for index, name in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) for row in rows) and bool(rows)
        grid.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*[_cell(value) for value in row])
    console().print(grid, markup=False)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def next_commands(commands: Sequence[tuple[str, str]]) -> None:
    """Prints what a user would want to do now: ``(purpose, command)`` pairs."""
    say("\nNext:")
    width = max(len(purpose) for purpose, _ in commands)
    for purpose, command in commands:
        say(f"  {purpose:<{width}}  {command}")
