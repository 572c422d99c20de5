"""What runs in each Ray Train worker."""

from __future__ import annotations

import functools
from typing import Any

import ray
import ray.train

from raydist.config.load import Recipe
from raydist.config.schema import RunConfig
from raydist.core.errors import RaydistError
from raydist.core.log import quiet_libraries, set_up_logging
from raydist.runtime.monitor import MonitorHook
from raydist.runtime.notices import StopNotices
from raydist.runtime.prometheus import PrometheusHook
from raydist.training.lease import is_held
from raydist.training.session import Outcome, run_attempt


def worker_main(payload: dict[str, Any]) -> dict[str, Any] | None:
    """One attempt. Ray has made the process group; after a failure Ray calls this anew in fresh processes.

    A user's mistake is left with the monitor, so that the attempt that Ray starts after it ends at once instead of meeting
    the same mistake until the failure limit.
    """
    quiet_libraries()
    set_up_logging()
    monitor = payload["monitor"]
    if ray.get(monitor.mistake.remote()) is not None:
        return None
    recipe = Recipe(RunConfig.model_validate(payload["config"]), payload["config_hash"], payload["recipe"])
    try:
        outcome: Outcome = run_attempt(
            recipe,
            run_dir=payload["run_dir"],
            hooks=[MonitorHook(monitor), PrometheusHook()],
            notice=StopNotices(monitor),
            is_ours=functools.partial(is_held, payload["run_dir"], payload["lease"]),
        )
    except RaydistError as error:
        ray.get(monitor.set_mistake.remote(type(error).__name__, error.fields()))
        raise
    return {"step": outcome.step, "metrics": outcome.metrics, "interrupted": outcome.interrupted}
