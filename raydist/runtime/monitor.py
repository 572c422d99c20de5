"""What the driver knows of the workers: events of rank 0, and the user's mistake if a worker met one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from raydist.core import errors
from raydist.training.hooks import Hook, RunFacts

_log = logging.getLogger(__name__)


class RunMonitor:
    """State of an actor that the driver makes, rank 0 writes to without waiting, and the driver polls."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._mistake: tuple[str, dict[str, str | None]] | None = None
        self._stop_reason: str | None = None

    def add(self, kind: str, content: Any) -> None:
        """Appends an event."""
        self._events.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def set_mistake(self, kind: str, fields: dict[str, str | None]) -> None:
        """Keeps the first mistake, which is the cause of the others."""
        self._mistake = self._mistake or (kind, fields)

    def mistake(self) -> tuple[str, dict[str, str | None]] | None:
        """Class name and fields of a :class:`RaydistError` that a worker raised, or None."""
        return self._mistake

    def request_stop(self, reason: str | None) -> None:
        """Asks the workers to save and to end their attempt; None takes the request back."""
        self._stop_reason = reason

    def stop_reason(self) -> str | None:
        """Why the attempt is to end, or None."""
        return self._stop_reason


class MonitorHook(Hook):
    """Sends what happens on rank 0 to the monitor."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def on_start(self, facts: RunFacts) -> None:
        """Sends the facts."""
        self._monitor.add.remote("start", dataclasses.asdict(facts))

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends a log line."""
        self._monitor.add.remote("log", (step, dict(metrics)))

    def on_checkpoint(self, step: int) -> None:
        """Sends the step."""
        self._monitor.add.remote("checkpoint", step)

    def on_stored(self, step: int, upload_s: float) -> None:
        """Sends the step and the time that storing took."""
        self._monitor.add.remote("stored", (step, upload_s))

    def on_save_failed(self, step: int) -> None:
        """Sends the step."""
        self._monitor.add.remote("save failed", step)


def replay(events: Sequence[tuple[str, Any]], hooks: Sequence[Hook]) -> None:
    """Calls the driver's hooks as the loop called rank 0's; warnings, which stand in that worker's log, are said here too."""
    for kind, content in events:
        facts = RunFacts(**content) if kind == "start" else None
        for warning in facts.warnings if facts is not None else ():
            _log.warning("%s", warning)
        for hook in hooks:
            if facts is not None:
                hook.on_start(facts)
            elif kind == "log":
                hook.on_log(*content)
            elif kind == "stored":
                hook.on_stored(*content)
            elif kind == "save failed":
                hook.on_save_failed(content)
            else:
                hook.on_checkpoint(content)


def raise_mistake(mistake: tuple[str, dict[str, str | None]] | None) -> None:
    """Raises a worker's mistake in the driver as if it had happened here."""
    if mistake is not None:
        kind, fields = mistake
        what = fields.pop("what") or ""
        raise getattr(errors, kind)(what, **fields)
