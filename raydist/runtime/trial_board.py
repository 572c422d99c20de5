"""Where the trials of a sweep and its driver meet: reports of workers, verdicts on them, ends of trials.

Ray Tune decides in the driver; a trial's rank 0 trains in a process of its own. At each validation rank 0 reports here and
waits for the verdict, so a stopped trial ends at the very step at which it was judged, by itself and on all ranks alike: its
process group, its placement group and its workers go the same way as those of a run that is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Event = tuple[str, dict[str, Any]]


@dataclass
class _Desk:
    """The state of one trial.

    Attributes:
        events: for the trial's actor: ``("report", ...)`` and at last ``("end", ...)``.
        pending_step: the step whose verdict a worker waits for; 0 for none.
        verdict: of that step.
        decided_step: the last step that was decided on.
        stopped: no further step is wanted.
    """

    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    pending_step: int = 0
    verdict: asyncio.Future[bool] | None = None
    decided_step: int = 0
    stopped: bool = False


class TrialBoard:
    """State of an asyncio actor that the driver makes; one for all trials."""

    def __init__(self) -> None:
        self._desks: dict[str, _Desk] = {}
        self._news: list[tuple[str, int, dict[str, float]]] = []

    async def begin(self, name: str) -> None:
        """A trial starts."""
        self._desks[name] = _Desk()

    async def note(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """A log line of a trial, for the driver's table."""
        self._news.append((name, step, dict(metrics)))

    async def take_news(self) -> list[tuple[str, int, dict[str, float]]]:
        """The log lines since the last call."""
        news, self._news = self._news, []
        return news

    async def report(self, name: str, step: int, metrics: Mapping[str, float], is_last: bool) -> bool:
        """What a validation measured; waits for the verdict and returns True if the trial is to stop.

        Nobody decides about the last step. A step that was decided on before, which a restarted worker reaches again, goes on.
        """
        desk = self._desks[name]
        if desk.stopped and not is_last:
            return True
        if step <= desk.decided_step:
            return False
        if desk.verdict is None or desk.pending_step != step:
            desk.pending_step, desk.verdict = step, asyncio.get_running_loop().create_future()
            desk.events.put_nowait(("report", {"step": step, "metrics": dict(metrics), "is_last": is_last}))
        if is_last:
            desk.decided_step = step
            return False
        return await asyncio.shield(desk.verdict)

    async def next_event(self, name: str) -> Event:
        """The next event of a trial; what was reported before is thereby decided: the trial goes on."""
        desk = self._desks[name]
        if desk.events.empty():
            self._decide(desk, stop=False)
        return await desk.events.get()

    async def stop(self, name: str) -> None:
        """The trial ends at the step at which it waits, or else at its next report."""
        desk = self._desks.get(name)
        if desk is not None:
            desk.stopped = True
            self._decide(desk, stop=True)

    async def end(self, name: str, outcome: Mapping[str, Any]) -> None:
        """The trial's workers are gone."""
        self._desks[name].events.put_nowait(("end", dict(outcome)))

    @staticmethod
    def _decide(desk: _Desk, *, stop: bool) -> None:
        if desk.verdict is not None and not desk.verdict.done():
            desk.decided_step = desk.pending_step
            desk.verdict.set_result(stop)
