"""Ray Train inside a trial's actor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray.train
from ray.train.torch import TorchConfig
from ray.train.v2._internal.constants import WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR

from raydist.config.schema import ScalingConfig
from raydist.core import storage
from raydist.runtime.elastic import ray_scaling
from raydist.runtime.ray_internals import InProcessTrainer, SpareGroups, mistake_of
from raydist.runtime.trainer import RAY_FOLDER, WORKER_ENVIRONMENT
from raydist.runtime.trial_worker import trial_worker


class TrainingThread:
    """Trains one trial in a thread, and tells ``on_end`` how it ended: ``{"stopped": ...}`` or ``{"failure": ...}``.

    Args:
        payload: what :func:`raydist.runtime.trial_worker.trial_worker` needs.
        scaling: the trial's workers.
        spare: workers of the trial before, and where these are left; None for workers that no other trial uses.
        on_end: called in the thread once the workers are gone.
    """

    def __init__(
        self,
        payload: dict[str, Any],
        *,
        scaling: ScalingConfig,
        spare: SpareGroups | None,
        on_end: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._payload = payload
        self._scaling = scaling
        self._spare = spare
        self._on_end = on_end
        self._thread = threading.Thread(target=self._run, name="raydist-trial", daemon=True)
        self._thread.start()

    def join(self, *, timeout_s: float) -> bool:
        """Waits for the end; False if it has not come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            outcome = self._fit()
        except Exception as error:  # whatever it is, the sweep goes on without this trial
            outcome = {"failure": last_words(error)}
        self._on_end(outcome)

    def _fit(self) -> Mapping[str, Any]:
        run_dir = self._payload["run_dir"]
        trainer = InProcessTrainer(
            trial_worker,
            spare=self._spare,
            train_loop_config=self._payload,
            torch_config=TorchConfig(timeout_s=int(self._scaling.collective_timeout_s)),
            scaling_config=ray_scaling(self._scaling),
            run_config=ray.train.RunConfig(
                name=RAY_FOLDER,
                storage_path=storage.local_path(run_dir),
                failure_config=ray.train.FailureConfig(max_failures=self._scaling.max_failures),
                worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            ),
        )
        os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(self._scaling.collective_timeout_s)
        return trainer.fit().return_value


def last_words(error: Exception) -> str:
    """A user's mistake as it is; else the end of the first failing rank's traceback, or of the error itself."""
    mistake = mistake_of(error)
    if mistake is not None:
        return str(mistake)
    failures = getattr(error, "worker_failures", {})
    rank, failure = next(iter(sorted(failures.items())), (None, error))
    lines = [line for line in str(failure).strip().splitlines() if line.strip()][-6:]
    text = "\n".join(line[:200] for line in lines) or type(error).__name__
    return text if rank is None else f"rank {rank}: {text}"
