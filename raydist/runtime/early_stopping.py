"""Which trials Ray Tune stops early, also after a restart of the sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from raydist.config.sweep_fairness import MetricConfig
from raydist.config.sweep_schema import SchedulerConfig
from raydist.evaluation.sweep_records import TrialRecord


class _PastTrial:
    """Stands for a trial of an earlier start of the sweep."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


def make_scheduler(
    config: SchedulerConfig, metric: MetricConfig, *, first_step: int, num_steps: int, past: Iterable[TrialRecord] = ()
) -> TrialScheduler:
    """The scheduler of a sweep, which compares trials at equal optimizer steps and never on wall-clock time.

    Args:
        config: the sweep's ``scheduler`` section.
        metric: what is compared.
        first_step: the first validation, the default of ``grace_steps``.
        num_steps: of a trial.
        past: trials that ended before a restart of the sweep; what they reported counts as it did then.
    """
    grace = config.grace_steps or first_step
    scheduler: TrialScheduler
    if config.name == "none":
        return FIFOScheduler()
    if config.name == "asha":
        scheduler = ASHAScheduler(
            time_attr="step",
            metric=metric.name,
            mode=metric.mode,
            max_t=num_steps,
            grace_period=grace,
            reduction_factor=config.reduction_factor,
            stop_last_trials=False,
        )
    else:
        scheduler = MedianStoppingRule(
            time_attr="step",
            metric=metric.name,
            mode=metric.mode,
            grace_period=grace,
            min_samples_required=2,
            min_time_slice=math.inf,  # a trial is never paused to let others catch up
        )
    for record in past:
        _replay(scheduler, record, metric.name)
    return scheduler


def catch_up(scheduler: TrialScheduler, trial: Any, record: TrialRecord, metric: str) -> None:
    """Tells of a trial that goes on after a restart of the sweep what it reported before.

    Without it the trial's next value, of a later step, would count at the rungs that it has passed already. What was decided
    on those values is not decided again: the trial goes on, and is judged by what it reports next.

    Args:
        scheduler: from :func:`make_scheduler`; has been told that the trial is there.
        trial: what the scheduler knows the trial by now.
        record: of the trial before the restart.
        metric: what is compared.
    """
    for result in _results(record, metric):
        if isinstance(scheduler, MedianStoppingRule):
            scheduler._results[trial].append(result)
        else:
            scheduler.on_trial_result(None, trial, result)


def _results(record: TrialRecord, metric: str) -> list[dict[str, Any]]:
    return [{"step": step, metric: value} for step, value in record.curve.get(metric, [])]


def _replay(scheduler: TrialScheduler, record: TrialRecord, metric: str) -> None:
    trial: Any = _PastTrial(record.name)
    scheduler.on_trial_add(None, trial)
    results = _results(record, metric)
    for result in results:
        if isinstance(scheduler, MedianStoppingRule) and trial in scheduler._stopped_trials:
            break
        scheduler.on_trial_result(None, trial, result)
    if results:
        scheduler.on_trial_complete(None, trial, results[-1])
