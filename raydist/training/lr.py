"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from raydist.config.schema import LearningRateConfig


def learning_rate_factor(schedule: LearningRateConfig, step: int, *, num_steps: int) -> float:
    """The factor on the peak rate at optimizer step ``step``, counted from 0.

    Warm-up is linear and reaches 1 at step ``warmup_steps``; the last step of the run, ``num_steps - 1``, has ``final_factor``
    for both decaying schedules.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    last = num_steps - 1
    start = schedule.warmup_steps
    if schedule.name == "stable_decay":
        start = max(start, last - round(schedule.decay_fraction * num_steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    fall = 1 - progress if schedule.name == "stable_decay" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.final_factor + (1 - schedule.final_factor) * fall
