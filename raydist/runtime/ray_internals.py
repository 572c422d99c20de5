"""All that sweeps use of the inside of Ray Train, in one place.

For each fit Ray Train starts a controller, a cleaner of placement groups, a manager of datasets, a watcher for preempted
nodes, a synchronization actor and the workers: Python processes with imports of their own, seconds of a trial that may last
no longer than that. A trial of a sweep does with fewer:

* the controller runs in the trial's actor, which lives for the whole sweep anyway;
* what the cleaner guards, placement groups of a controller that died, Ray removes itself when their creator, that actor, dies;
* datasets and the watcher are left out: raydist reads data itself, and a trial on a node that is taken away goes on from its
  newest checkpoint;
* a mistake of the user's is not tried again;
* workers, their placement group and their synchronization actor may serve the next trial of the same shape.

None of this is public, hence the pinned version; ``tests/runtime/test_ray_internals.py`` says what a new one changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.worker_group import ReplicaGroup, Worker, WorkerGroup
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState, WorkerGroupStateBuilder
from ray.train.v2._internal.util import invoke_context_managers

from raydist.core.errors import RaydistError
from raydist.runtime.spare_workers import KEEP_S, SpareWorkers, forget_trial

# Read by the controller; a watcher is one more process for each fit.
ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
_NOT_NEEDED = (PlacementGroupCleanerCallback, DatasetsCallback)
_HOOK_PATIENCE_S = 5.0


SpareGroups = SpareWorkers[WorkerGroupState]


def spare_workers(*, keep_s: float = KEEP_S) -> SpareGroups:
    """A place for one group of workers, in the actor that runs the controllers."""
    return SpareWorkers(lambda state: state.shutdown(), keep_s=keep_s)


class InProcessTrainer(TorchTrainer):
    """A TorchTrainer whose controller runs in the calling thread.

    Args:
        function: what each worker runs.
        spare: where workers are taken from and left; None for workers that serve this trainer alone.
        arguments: of a TorchTrainer.
    """

    def __init__(self, function: Callable[..., Any], *, spare: SpareGroups | None, **arguments: Any) -> None:
        super().__init__(function, **arguments)
        self._spare = spare

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, _NOT_NEEDED)]

    def _initialize_and_run_controller(self, **controller_arguments: Any) -> Any:
        controller_arguments["failure_policy"] = _MistakesAreFinal(self.run_config.failure_config)
        controller = TrainController(**controller_arguments)
        if self._spare is not None:
            controller.worker_group_cls = _Groups(self._spare)
        try:
            asyncio.run(controller.run())
        finally:
            group = controller.get_worker_group()
            if group is not None:
                group.abort()
        return controller.get_result()


def mistake_of(error: Exception) -> RaydistError | None:
    """The user's mistake that a worker met, if that is why a fit failed."""
    failures = getattr(error, "worker_failures", {}).values()
    return next((failure for failure in failures if isinstance(failure, RaydistError)), None)


class _MistakesAreFinal(DefaultFailurePolicy):
    """Tries again after any failure but a user's mistake, which the next attempt would only meet again."""

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        if mistake_of(training_failed_error) is not None:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _Groups:
    """Makes worker groups for a controller, as the class that it is given otherwise does."""

    def __init__(self, spare: SpareGroups) -> None:
        self._spare = spare

    def create(self, **arguments: Any) -> WorkerGroup:
        group = _ReusingGroup(spare=self._spare, **arguments)
        group._start()
        return group


class _ReusingGroup(WorkerGroup):
    """Starts on the workers of the group before if they are spare, and leaves its own if all of them ended well."""

    def __init__(self, *, spare: SpareGroups, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._spare = spare

    @property
    def _shape(self) -> object:
        context = self._worker_group_context
        return context.num_workers, context.resources_per_worker, context.placement_strategy, context.label_selector

    def _start_impl(self, worker_group_state_builder: WorkerGroupStateBuilder) -> None:
        kept = self._spare.take(shape=self._shape)
        if kept is None:
            super()._start_impl(worker_group_state_builder)
            return
        worker_group_state_builder.with_placement_group_handle(kept.placement_group_handle)
        worker_group_state_builder.with_sync_actor(kept.sync_actor)
        worker_group_state_builder.with_workers(kept.workers)
        try:
            self._start_on(kept.workers, worker_group_state_builder)
        except RayActorError as error:  # died while it was spare; the controller tries again with new ones
            self._clear_state()
            raise WorkerGroupStartupFailedError("a spare worker is gone") from error

    def _start_on(self, workers: list[Worker], builder: WorkerGroupStateBuilder) -> None:
        """Does what Ray does once workers exist."""
        with invoke_context_managers([callback.on_worker_group_start for callback in self._callbacks]):
            for callback in self._callbacks:
                callback.before_worker_group_start(self._worker_group_context)
            self._replica_groups = [
                ReplicaGroup([worker], self.get_resources_per_worker(), self._replica_group_callbacks)
                for worker in workers
            ]
            self._worker_rank_to_replica_group_rank = {rank: rank for rank in range(len(workers))}
            self._init_train_context(workers, builder.sync_actor)
            self._worker_group_state = builder.build()
            for callback in self._callbacks:
                callback.after_worker_group_start(self)
        function = self._worker_group_context.train_fn_ref
        ray.get([worker.actor.run_train_fn.remote(function) for worker in workers])
        for callback in self._callbacks:
            callback.after_worker_group_training_start(self)

    def shutdown(self) -> None:
        """Leaves the workers to the next trial, or ends them if any of them failed."""
        status = self.get_latest_poll_status()
        if status is None or not status.finished or status.errors:
            super().shutdown()
            return
        with invoke_context_managers([callback.on_worker_group_shutdown for callback in self._callbacks]):
            for callback in self._callbacks:
                callback.before_worker_group_shutdown(self)
            hooks = [worker.actor.shutdown.remote() for worker in self.get_workers()]
            ray.wait(hooks, num_returns=len(hooks), timeout=_HOOK_PATIENCE_S)
            state = self._worker_group_state
            try:
                self.execute(forget_trial)
            except RayError:
                state.shutdown()
            else:
                self._spare.put(state, shape=self._shape)
            self._clear_state()
            for callback in self._callbacks:
                callback.after_worker_group_shutdown(self._worker_group_context)
