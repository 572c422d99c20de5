"""Time in a flow sampler: the grid of the steps, and what the model is told when the schedule is not the trained one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from raydist.core.errors import ConfigError
from raydist.paths.base import PathConfig
from raydist.paths.schedules import Schedule

GridName = Literal["uniform", "power", "kappa"]
_NOT_COMPARED: Mapping[str, bool | set[str]] = {
    "schedule": True,  # looked at by itself
    "coupling": True,  # of training alone
    "step_rule": True,  # these two of sampling alone
    "flux_rule": True,
    "source": {"path"},  # where a file lies
    "metric": {"path"},
}


@dataclass(frozen=True)
class FlowClock:
    """Times of a roll-out.

    Attributes:
        schedule: of the path that is sampled; None where it has none that is the same for all tokens.
        trained_schedule: of the path that the model was trained with, where it differs; else None.
    """

    schedule: Schedule | None
    trained_schedule: Schedule | None = None

    def model_time(self, time: float) -> float:
        """The trained time at which the path has as much data as the sampled one has now: ``kappa_trained^-1(kappa_t)``.

        The posterior of a mixture path depends on the time through kappa alone (Gat et al. 2024, arXiv 2407.15595), so
        that a schedule may be chosen after training.
        """
        if self.schedule is None or self.trained_schedule is None:
            return time
        kappa = self.schedule.value(torch.tensor(time, dtype=torch.float64))
        return float(self.trained_schedule.inverse(kappa))

    def grid(self, name: GridName, *, power: float, num_steps: int) -> list[float]:
        """``num_steps + 1`` increasing times from 0 to 1.

        Raises:
            ConfigError: a kappa grid for a path without a schedule that is the same for all tokens.
        """
        shares = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        if name == "power":
            shares = shares**power
        elif name == "kappa":
            if self.schedule is None:
                raise ConfigError(
                    "equal shares of data are not defined for this path",
                    where="sampler.time_grid",
                    found="kappa",
                    expected="a mixture path whose schedule is the same for all tokens",
                    fix="use time_grid: uniform or power",
                )
            shares = self.schedule.inverse(shares)
        return [0.0, *shares[1:-1].tolist(), 1.0]


def flow_clock(path: PathConfig, *, trained_path: PathConfig | None) -> FlowClock:
    """The clock for sampling ``path`` with a model that was trained with ``trained_path`` (None: not known).

    Raises:
        ConfigError: the paths differ in more than the schedule, which both must have then, and the rule of steps.
    """
    schedule = getattr(path, "schedule", None)
    shared = schedule if isinstance(schedule, Schedule) else None
    if trained_path is None:
        return FlowClock(shared)
    sampled, trained = (config.model_dump(mode="json", exclude=_NOT_COMPARED) for config in (path, trained_path))
    differing = {key for key in sampled.keys() | trained.keys() if sampled.get(key) != trained.get(key)}
    trained_schedule = getattr(trained_path, "schedule", None)
    if not differing and schedule == trained_schedule:
        return FlowClock(shared)
    if differing or shared is None or not isinstance(trained_schedule, Schedule):
        raise ConfigError(
            "the model was trained with another path",
            where="sampler.path",
            found=f"another {', '.join(sorted(differing or {'schedule'}))}",
            expected=f"{trained_path.model_dump(mode='json')}; after training the schedule and the rule of steps may change",
            fix="leave sampler.path out",
        )
    return FlowClock(shared, trained_schedule)
