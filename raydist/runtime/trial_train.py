"""Ray Train inside a trial, with as few processes as it can do with.

Ray Train starts a controller, a detached cleaner and a manager of Ray datasets for each fit, each a Python process with its
own imports: several seconds of a trial that may last no longer than that. A trial's actor lives for the whole sweep anyway,
so the controller runs in it, and what the cleaner guards, placement groups of a controller that died, Ray removes itself when
their creator, the trial's actor, dies. That is internal to Ray, hence the pinned version and the test that looks for
left-over placement groups.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController

from raydist.config.schema import ScalingConfig
from raydist.core import storage
from raydist.runtime.trainer import RAY_FOLDER, WORKER_ENVIRONMENT, ray_scaling
from raydist.runtime.trial_worker import trial_worker

# The cleaner: see above. Ray Data's part: a process for each fit, and Ray Data imported in every worker, which is not used.
_NOT_NEEDED = (PlacementGroupCleanerCallback, DatasetsCallback)


class TrialTrainer(TorchTrainer):
    """A TorchTrainer whose controller runs in the calling thread."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, _NOT_NEEDED)]

    def _initialize_and_run_controller(self, **controller_arguments: Any) -> Any:
        controller = TrainController(**controller_arguments)
        try:
            asyncio.run(controller.run())
        finally:
            group = controller.get_worker_group()
            if group is not None:
                group.abort()
        return controller.get_result()


class TrainingThread:
    """Trains one trial in a thread, and tells ``on_end`` how it ended: ``{"stopped": ...}`` or ``{"failure": ...}``.

    Args:
        payload: what :func:`raydist.runtime.trial_worker.trial_worker` needs.
        scaling: the trial's workers.
        on_end: called in the thread once the workers are gone.
    """

    def __init__(
        self, payload: dict[str, Any], *, scaling: ScalingConfig, on_end: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._payload = payload
        self._scaling = scaling
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
        trainer = TrialTrainer(
            trial_worker,
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
        mistake: str | None = None
        try:
            result = trainer.fit()
        except ray.train.WorkerGroupError:
            mistake = ray.get(self._payload["board"].failure.remote(self._payload["name"]))
            if mistake is None:
                raise
        mistake = mistake or ray.get(self._payload["board"].failure.remote(self._payload["name"]))
        return {"failure": mistake} if mistake else result.return_value


def last_words(error: BaseException) -> str:
    """The end of the first failing rank's traceback, or of the error itself."""
    failures = getattr(error, "worker_failures", {})
    rank, failure = next(iter(sorted(failures.items())), (None, error))
    lines = [line for line in str(failure).strip().splitlines() if line.strip()][-6:]
    text = "\n".join(line[:200] for line in lines) or type(error).__name__
    return text if rank is None else f"rank {rank}: {text}"
