"""A run on Ray Train: workers, restarts after failures, progress to the driver."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from raydist.config.load import Recipe, with_absolute_paths
from raydist.config.schema import ScalingConfig
from raydist.core import storage
from raydist.core.errors import CapacityError
from raydist.runtime.cluster import connected, require_capacity
from raydist.runtime.monitor import RunMonitor, raise_mistake, replay
from raydist.runtime.worker import worker_main
from raydist.training.hooks import Hook
from raydist.training.session import Outcome

_POLL_S = 0.3
RAY_FOLDER = "ray"
# Ray trains in a thread, and glibc gives a thread memory that it returns to the kernel whenever it is free: a fifth of a CPU
# step. With one arena the thread shares the main one, which keep_freed_memory() tells to keep what it has.
WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}


def train_on_ray(recipe: Recipe, *, run_dir: str, address: str | None = None, hooks: Sequence[Hook] = ()) -> Outcome:
    """Runs to the end on Ray Train workers, restarting them after failures from the newest complete checkpoint.

    Args:
        recipe: the resolved recipe.
        run_dir: prepared by :func:`raydist.training.run_dir.prepare_run_dir`; every node must reach it.
        address: of a running cluster; None embeds one.
        hooks: called in this process with what rank 0 reports.

    Raises:
        RaydistError: a worker met a mistake of the user's, or workers failed more often than allowed.
    """
    scaling = recipe.config.scaling
    with connected(address=address, min_cpus=scaling.num_workers * scaling.cpus_per_worker):
        require_capacity(scaling)
        monitor = ray.remote(num_cpus=0)(RunMonitor).remote()
        payload = {
            "config": with_absolute_paths(recipe.config).model_dump(mode="json"),
            "config_hash": recipe.config_hash,
            "recipe": recipe.path,
            "run_dir": run_dir,
            "monitor": monitor,
        }
        trainer = TorchTrainer(
            worker_main,
            train_loop_config=payload,
            torch_config=TorchConfig(timeout_s=int(scaling.collective_timeout_s)),
            scaling_config=ray_scaling(scaling),
            run_config=ray.train.RunConfig(
                name=RAY_FOLDER,
                storage_path=run_dir if storage.is_remote(run_dir) else storage.local_path(run_dir),
                failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
                worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            ),
        )
        with _Relay(monitor, hooks):
            try:
                result = trainer.fit()
            except ray.train.WorkerGroupError as error:
                raise_mistake(ray.get(monitor.mistake.remote()))
                raise _gave_up(error, recipe) from None
        raise_mistake(ray.get(monitor.mistake.remote()))
        return Outcome(**result.return_value)


def ray_scaling(scaling: ScalingConfig) -> ray.train.ScalingConfig:
    """The workers of a run, in Ray's words."""
    return ray.train.ScalingConfig(
        num_workers=scaling.num_workers,
        use_gpu=scaling.use_gpu,
        resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1.0} if scaling.use_gpu else {})},
    )


class _Relay:
    """Polls the monitor in a thread and calls the driver's hooks."""

    def __init__(self, monitor: object, hooks: Sequence[Hook]) -> None:
        self._monitor = monitor
        self._hooks = hooks
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raydist-relay", daemon=True)

    def __enter__(self) -> _Relay:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            is_last = self._stopped.wait(_POLL_S)
            replay(ray.get(self._monitor.take.remote()), self._hooks)  # type: ignore[attr-defined]
            if is_last:
                return


def _gave_up(error: Exception, recipe: Recipe) -> CapacityError:
    """The first failing rank's last words, on one screen."""
    failures = getattr(error, "worker_failures", {})
    rank, failure = next(iter(sorted(failures.items())), (None, error))
    last_words = [line for line in str(failure).strip().splitlines() if line.strip()][-6:]
    return CapacityError(
        "the workers failed more often than scaling.max_failures allows",
        where=f"rank {rank}" if rank is not None else None,
        found="\n".join(line[:200] for line in last_words),
        expected=f"at most {recipe.config.scaling.max_failures} failures",
        fix=f"mend the cause, then go on: raydist train {recipe.path} name={recipe.config.name} --resume",
    )
