"""Runs whose number of workers follows the cluster.

Ray Train starts such a run with as many workers as fit, and tears the group down without a checkpoint when more would fit.
Here the group is asked to save and to end instead, so that growing loses no step; the driver then starts it anew. Sizes that
do not divide the batch are passed over. The policy is internal to Ray, hence the pinned version and the tests that take
nodes away and add them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from raydist.config.schema import RunConfig, ScalingConfig

_LOOK_FOR_NODES_EVERY_S = 10.0


def ray_scaling(scaling: ScalingConfig) -> ray.train.ScalingConfig:
    """A fixed number of workers, in Ray's words."""
    return ray.train.ScalingConfig(
        num_workers=scaling.num_workers,
        use_gpu=scaling.use_gpu,
        resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1.0} if scaling.use_gpu else {})},
    )


class RunTrainer(TorchTrainer):
    """A TorchTrainer for one run, elastic if its configuration says so, and without Ray Data, which is not used.

    Args:
        train_loop_per_worker: the workers' function.
        config: of the run.
        monitor: actor handle of the run's :class:`raydist.runtime.monitor.RunMonitor`.
        arguments: those of a TorchTrainer but for ``scaling_config``.
    """

    def __init__(self, train_loop_per_worker: Any, *, config: RunConfig, monitor: Any, **arguments: Any) -> None:
        scaling = ray_scaling(config.scaling)
        self._sizes = config.world_sizes()
        self._monitor = monitor
        if len(self._sizes) > 1:
            limits = (self._sizes[0], self._sizes[-1])
            scaling = replace(scaling, num_workers=limits, elastic_resize_monitor_interval_s=_LOOK_FOR_NODES_EVERY_S)
        super().__init__(train_loop_per_worker, scaling_config=scaling, **arguments)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            policy = _SavingPolicy(self.scaling_config, sizes=self._sizes, monitor=self._monitor)
            arguments["scaling_policy"] = policy
        return super()._initialize_and_run_controller(**arguments)


class _SavingPolicy(ElasticScalingPolicy):
    """Starts with the largest allowed size that fits, and asks a smaller group to save and end when more would fit."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, *, sizes: Sequence[int], monitor: Any) -> None:
        super().__init__(scaling_config)
        self._sizes = sizes
        self._monitor = monitor

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= possible), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers:
            self._monitor.request_stop.remote(f"there is room for {decision.num_workers} workers")
        return NoopDecision()
