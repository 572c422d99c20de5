"""What the training loop knows of tracking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Takes metrics and artifacts of one run.

    No method raises because a server is away, and ``log_metrics`` never waits for one: the training thread calls it.
    """

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Records values of an optimizer step. Keys group by ``/``: ``loss/ntp``, ``validation/loss``."""

    def log_artifact(self, path: str, *, folder: str = "") -> None:
        """Records a file or folder, below ``folder`` of the run; it must stay where it is until the run has ended."""

    def publish(self) -> None:
        """Brings the metrics into the run directory where that is a bucket; raises StorageError if it cannot. Any thread."""

    def flush(self, *, timeout_s: float = 30.0) -> bool:
        """Waits until all that was logged has arrived; False if it had not in time."""

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Flushes, and says in one line what could not be delivered and how to replay it."""
