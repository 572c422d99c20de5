"""Which trials a sweep runs next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from raydist.config.sweep import Sweep
from raydist.config.sweep_fairness import MetricConfig
from raydist.config.sweep_values import Choice
from raydist.core.errors import ConfigError
from raydist.evaluation.sweep_records import TrialRecord, final_value
from raydist.runtime.sweep_dir import TrialEntry

Proposal = tuple[int, dict[str, Any]]


class Proposals(Protocol):
    """Gives trials one after the other."""

    def next(self) -> Proposal | None:
        """Number and parameters of the next trial; None when there is none any more."""

    def tell(self, index: int, record: TrialRecord) -> None:
        """How a trial ended."""


def make_proposals(sweep: Sweep, *, past: Sequence[tuple[TrialEntry, TrialRecord]] = ()) -> Proposals:
    """The trials of a sweep that are still to be run; those that an earlier start left unfinished come first.

    Raises:
        ConfigError: ``tpe`` without Optuna.
    """
    if sweep.config.search.name == "tpe":
        return TpeProposals(sweep, past=past)
    trials = sweep.grid() if sweep.config.search.name == "grid" else sweep.random_trials()
    done = {entry.index for entry, _ in past if entry.is_done}
    begun = {entry.index for entry, _ in past} - done
    order = [*sorted(begun), *(index for index in range(len(trials)) if index not in done | begun)]
    return ListedProposals((index, trials[index]) for index in order)


class ListedProposals:
    """Trials that are known from the start."""

    def __init__(self, trials: Iterable[Proposal]) -> None:
        self._waiting = deque(trials)

    def next(self) -> Proposal | None:
        """The first that waits."""
        return self._waiting.popleft() if self._waiting else None

    def tell(self, index: int, record: TrialRecord) -> None:
        """Changes nothing."""


class TpeProposals:
    """Optuna's tree-structured Parzen estimator, also for several metrics.

    A restart tells it all trials that ended before, in their order; those that were begun are proposed again as they were.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, sweep: Sweep, *, past: Sequence[tuple[TrialEntry, TrialRecord]] = ()) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "tpe needs Optuna",
                where="search.name",
                found="tpe",
                expected="grid or random, which need nothing",
                fix="pip install 'raydist[sweep]'",
            ) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._states = optuna.trial.TrialState
        self._sweep = sweep
        self._metrics: list[MetricConfig] = sweep.config.metric
        self._begun = deque((entry.index, entry.parameters) for entry, _ in past if not entry.is_done)
        self._asked: dict[int, Any] = {}
        self._next_index = 1 + max((entry.index for entry, _ in past), default=-1)
        seed = sweep.config.search.seed + len(past)
        self._study = optuna.create_study(
            directions=["minimize" if metric.mode == "min" else "maximize" for metric in self._metrics],
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        for entry, record in past:
            self._enqueue(entry.parameters)
            self._ask(entry.index)
            if entry.is_done:
                self.tell(entry.index, record)

    def next(self) -> Proposal | None:
        """A trial that was begun before, or a new one from what is known now."""
        if self._begun:
            return self._begun.popleft()
        if self._next_index >= (self._sweep.config.search.num_trials or 0):
            return None
        index = self._next_index
        self._next_index += 1
        return index, self._ask(index)

    def tell(self, index: int, record: TrialRecord) -> None:
        """Values of a finished trial; of a stopped one, how far it came."""
        trial = self._asked.pop(index)
        values = [final_value(record, metric.name) for metric in self._metrics]
        if record.state == "failed" or any(value is None for value in values):
            self._study.tell(trial, state=self._states.FAIL)
        elif record.state == "finished":
            self._study.tell(trial, [value for value in values if value is not None])
        else:
            for step, value in record.curve[self._metrics[0].name] if len(self._metrics) == 1 else ():
                trial.report(value, step)
            self._study.tell(trial, state=self._states.PRUNED if len(self._metrics) == 1 else self._states.FAIL)

    def _ask(self, index: int) -> dict[str, Any]:
        trial = self._asked[index] = self._study.ask()
        return self._sweep.space.trial(lambda key, distribution: distribution.suggest(key, trial))

    def _enqueue(self, parameters: Mapping[str, Any]) -> None:
        raw = {}
        for key, value in parameters.items():
            distribution = self._sweep.config.space[key]
            raw[key] = distribution.choice.index(value) if isinstance(distribution, Choice) else value
        self._study.enqueue_trial(raw)
