"""The live display of a transfer: bytes there, bytes per second and time left; nothing where there is no terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class TransferDisplay:
    """A bar that any thread may move.

    Attributes:
        num_fetched_bytes: without those that were there before.
    """

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("pulling", total=None)
        self.num_fetched_bytes = 0

    def __enter__(self) -> TransferDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, fetched_bytes: int, there_bytes: int, total_bytes: int) -> None:
        """Moves the bar to ``there_bytes`` of ``total_bytes``."""
        self.num_fetched_bytes = fetched_bytes
        self._bar.update(self._task, completed=there_bytes, total=total_bytes)
