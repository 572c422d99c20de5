"""When a run is saved: at steps that the recipe names, and when too much time has passed."""

from __future__ import annotations

import time
from collections.abc import Callable


class SaveSchedule:
    """Step numbers are the same on all workers. Clocks are not: rank 0's decides, and the loop spreads the decision.

    Args:
        every_steps: multiples of it are saved; None for none.
        every_minutes: longest time between two saves; None for any.
        keep_every_steps: multiples of it are saved too, since they are kept for good; None for none.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        every_steps: int | None,
        every_minutes: float | None,
        keep_every_steps: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._periods = [period for period in (every_steps, keep_every_steps) if period is not None]
        self._longest_s = None if every_minutes is None else 60.0 * every_minutes
        self._clock = clock
        self._saved_at = clock()

    def names(self, step: int) -> bool:
        """Whether the step is saved whatever the clock says."""
        return any(step % period == 0 for period in self._periods)

    def is_overdue(self) -> bool:
        """Whether this process's clock asks for a save."""
        return self._longest_s is not None and self._clock() - self._saved_at >= self._longest_s

    def restart(self) -> None:
        """A save begins now."""
        self._saved_at = self._clock()
