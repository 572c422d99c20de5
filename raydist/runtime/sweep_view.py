"""What a sweep's runner knows of who watches it and of what its trials are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray import tune

from raydist.evaluation.sweep_records import TrialRecord


class SweepView:
    """Watches a sweep; override what you need."""

    def on_plan(self, *, at_once: int, text: str) -> None:
        """Before the first trial: how many run at a time, and why."""

    def on_change(self, records: Sequence[TrialRecord]) -> None:
        """A trial began, was measured, or ended."""

    def on_end(self, record: TrialRecord, *, failure: str) -> None:
        """A trial ended; ``failure`` says why where it failed."""


class Kind(Protocol):
    """What a sweep's trials are: :class:`~raydist.runtime.train_trials.TrainTrials` or the sampler's."""

    trainable: type[tune.Trainable]

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raises ConfigError where there can be no such trial."""

    def share(self, parameters: Mapping[str, Any], nodes: Sequence[Mapping[str, float]]) -> float:
        """The part of the cluster that a trial takes; raises CapacityError where it cannot fit."""

    def resources(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        """What Tune reserves for the trial's own actor."""

    def prepare(self, index: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of the trial's actor."""

    def ended(self, record: TrialRecord) -> None:
        """A trial is over."""

    def rebook(self, index: int, record: TrialRecord) -> None:
        """A trial was over before this start, and its MLflow run is missing or incomplete."""
