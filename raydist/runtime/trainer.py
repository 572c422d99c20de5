"""A run on Ray Train: workers, restarts after failures, progress to the driver."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydist.config.load import Recipe, with_absolute_paths
from raydist.config.schema import ScalingConfig
from raydist.core import storage
from raydist.core.errors import CapacityError
from raydist.core.log import get_logger
from raydist.runtime.cluster import connected, missing_room, require_capacity
from raydist.runtime.elastic import RunTrainer
from raydist.runtime.monitor import RunMonitor, raise_mistake, replay
from raydist.runtime.stopping import StopSignals
from raydist.runtime.worker import worker_main
from raydist.tracking.mlflow_runs import RunHandle
from raydist.tracking.run_files import RunFiles
from raydist.training.hooks import Hook, RunFacts
from raydist.training.lease import holder_of
from raydist.training.session import Outcome

_POLL_S = 0.3
_ROOM_PATIENCE_S = 8.0
RAY_FOLDER = "ray"
# Ray trains in a thread, and glibc gives a thread memory that it returns to the kernel whenever it is free: a fifth of a CPU
# step. With one arena the thread shares the main one, which keep_freed_memory() tells to keep what it has.
WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
_log = get_logger(__name__)


def train_on_ray(recipe: Recipe, *, run_dir: str, address: str | None = None, hooks: Sequence[Hook] = ()) -> Outcome:
    """Runs to the end on Ray Train workers, restarting them after failures from the newest complete checkpoint.

    SIGTERM or Ctrl-C ends it earlier, with a checkpoint of the last step and ``Outcome.interrupted`` set.

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
        _tag_job(run_dir)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        monitor = ray.remote(num_cpus=0, scheduling_strategy=here)(RunMonitor).remote()  # no other node's loss takes it
        payload = {
            "config": with_absolute_paths(recipe.config).model_dump(mode="json"),
            "config_hash": recipe.config_hash,
            "recipe": recipe.path,
            "run_dir": run_dir,
            "lease": holder_of(run_dir),
            "monitor": monitor,
        }
        room = _RoomWatch(scaling)
        with _Relay(monitor, [room, *hooks], look=room.look), StopSignals(grace_s=scaling.stop_grace_s) as signals:
            while True:
                outcome = _fit(payload, recipe, signals)
                if signals.reason is not None or not outcome.interrupted:
                    return outcome
                ray.get(monitor.request_stop.remote(None))


def _tag_job(run_dir: str) -> None:
    """The MLflow run is opened before Ray is connected, and a driver's environment does not name its job."""
    RunHandle(RunFiles(run_dir)).set_tags({"ray.job_id": ray.get_runtime_context().get_job_id()})


def _fit(payload: dict[str, Any], recipe: Recipe, signals: StopSignals) -> Outcome:
    """Trains until the run is done, or until its workers have saved and ended because nodes come or go.

    Raises:
        RaydistError: see :func:`train_on_ray`.
        KeyboardInterrupt: the workers did not end within the grace after a signal.
    """
    monitor, run_dir, scaling = payload["monitor"], payload["run_dir"], recipe.config.scaling
    trainer = RunTrainer(
        worker_main,
        config=recipe.config,
        monitor=monitor,
        train_loop_config=payload,
        torch_config=TorchConfig(timeout_s=int(scaling.collective_timeout_s)),
        run_config=ray.train.RunConfig(
            name=RAY_FOLDER,
            storage_path=run_dir if storage.is_remote(run_dir) else storage.local_path(run_dir),
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(scaling.collective_timeout_s)
    try:
        result = _result_of(trainer, monitor, signals)
    except ray.train.TrainingFailedError as error:
        raise_mistake(ray.get(monitor.mistake.remote()))
        raise _gave_up(error, recipe) from None
    raise_mistake(ray.get(monitor.mistake.remote()))
    return Outcome(**result.return_value)


def _result_of(trainer: TorchTrainer, monitor: Any, signals: StopSignals) -> ray.train.Result:
    """Fits in a thread, where Ray does not take Ctrl-C for itself, and passes a signal on to the workers."""
    future: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            future.set_result(trainer.fit())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=fit, name="raydist-fit", daemon=True).start()
    is_told = False
    while not wait([future], timeout=_POLL_S).done:
        if signals.reason is not None and not is_told:
            monitor.request_stop.remote(f"the driver received {signals.reason}")
            is_told = True
        signals.raise_if_overdue()
    return future.result()


class _RoomWatch(Hook):
    """Says why nothing happens: Ray waits without a word, and without end, for room in a busy cluster or for a lost node."""

    def __init__(self, scaling: ScalingConfig) -> None:
        self._scaling = scaling
        self._next_look = time.monotonic() + _ROOM_PATIENCE_S
        self._is_waiting = self._has_spoken = False

    def on_start(self, facts: RunFacts) -> None:
        """The workers are there; the next wait is another one."""
        self._is_waiting = self._has_spoken = False

    def look(self) -> None:
        """Called again and again; speaks once when the run has waited at two looks in a row."""
        if self._has_spoken or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _ROOM_PATIENCE_S
        missing = missing_room(self._scaling)
        if missing is not None and self._is_waiting:
            _log.warning("the run waits for room in the Ray cluster: %s", missing)
            self._has_spoken = True
        self._is_waiting = missing is not None


class _Relay:
    """Polls the monitor in a thread and calls the driver's hooks; trouble there costs what it would have said, not the run.

    Args:
        monitor: the actor.
        hooks: of the driver.
        look: called at every poll.
    """

    def __init__(self, monitor: object, hooks: Sequence[Hook], *, look: Callable[[], None] = lambda: None) -> None:
        self._monitor = monitor
        self._hooks = hooks
        self._look = look
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raydist-relay", daemon=True)

    def __enter__(self) -> _Relay:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        is_failing = False
        while True:
            is_last = self._stopped.wait(_POLL_S)
            try:
                replay(ray.get(self._monitor.take.remote()), self._hooks)  # type: ignore[attr-defined]
                self._look()
                is_failing = False
            except Exception as error:
                if not is_failing:
                    _log.warning(
                        "progress is not passed on: %s: %s", type(error).__name__, " ".join(str(error).split())[:300]
                    )
                is_failing = True
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
