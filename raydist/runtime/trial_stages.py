"""Where the time of a trial goes, from the driver's proposal to the line that says how it ended."""

from __future__ import annotations

import time
from collections.abc import Mapping

# Stage -> what it ends with.
STAGES = {
    "actor": "the trial's actor has the trial",
    "workers": "rank 0 runs: placement, processes, imports, process group",
    "assembly": "the first step: data, model, checkpoint",
    "steps": "the last step, validations and saves between them included",
    "export": "rank 0 is done: the last checkpoint is stored, the model exported",
    "release": "the workers are free, or left to the next trial",
    "report": "the driver has written the end",
}


def mark(marks: dict[str, float], stage: str) -> None:
    """Notes that a stage ends now, in seconds since 1970, as stages end in several processes.

    Raises:
        ValueError: there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}")
    marks[stage] = time.time()


def durations_s(began: float, marks: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each stage that has a mark; a stage without one counts to the next."""
    durations = {}
    for stage in STAGES:
        if stage in marks:
            durations[stage] = round(max(0.0, marks[stage] - began), 3)
            began = marks[stage]
    return durations
