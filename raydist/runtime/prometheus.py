"""Metrics of a run at Ray's own Prometheus endpoint, for ``clusters/grafana_dashboard.json``.

Each gauge is exported by the node of rank 0 under ``ray_<name>``. The only tag is the run's name: a tag that changed with
steps or attempts would make a new time series each time. Ages are not exported but points in time, from which a query
subtracts: ``time() - ray_raydist_checkpoint_timestamp_seconds`` goes on rising when the run is stuck.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from ray.util.metrics import Gauge
from typing_extensions import override

from raydist.training.hooks import Hook, RunFacts

EXPORT_PREFIX = "ray_"

# Gauge name -> what it says.
GAUGES: dict[str, str] = {
    "raydist_step": "Optimizer steps done",
    "raydist_num_steps": "Optimizer steps of the whole run",
    "raydist_workers": "Workers of this attempt",
    "raydist_start_step": "First step of this attempt",
    "raydist_loss": "Training loss since the last log line",
    "raydist_validation_loss": "Loss of the last validation",
    "raydist_grad_norm": "Largest global gradient norm since the last log line",
    "raydist_learning_rate": "Learning rate of the last step",
    "raydist_tokens": "Clean tokens read since step 0",
    "raydist_tokens_per_second": "Clean tokens a second over all workers",
    "raydist_step_seconds": "Mean seconds of a step, without validation and saving",
    "raydist_mfu": "Model FLOPs utilisation, 0 to 1",
    "raydist_heartbeat_timestamp_seconds": "Unix time of the last log line",
    "raydist_checkpoint_step": "Step of the newest checkpoint that is complete on storage",
    "raydist_checkpoint_timestamp_seconds": "Unix time at which that checkpoint was complete",
    "raydist_checkpoint_upload_seconds": "Seconds from the plan of a save until it was complete",
}

# A metric of the log line -> the gauge that shows it.
_OF_LOG_LINE = {
    "loss": "raydist_loss",
    "validation/loss": "raydist_validation_loss",
    "grad_norm": "raydist_grad_norm",
    "learning_rate": "raydist_learning_rate",
    "tokens": "raydist_tokens",
    "tokens_per_s": "raydist_tokens_per_second",
    "step_s": "raydist_step_seconds",
    "mfu": "raydist_mfu",
}


class PrometheusHook(Hook):
    """Exports what rank 0 knows; made in a Ray worker."""

    def __init__(self) -> None:
        self._gauges = {
            name: Gauge(name, description=description, tag_keys=("run",)) for name, description in GAUGES.items()
        }
        self._tags: dict[str, str] = {}

    @override
    def on_start(self, facts: RunFacts) -> None:
        """Learns the run's name, without which nothing is exported."""
        self._tags = {"run": facts.name}
        self._set("raydist_num_steps", facts.num_steps)
        self._set("raydist_start_step", facts.start_step)
        self._set("raydist_step", facts.start_step)
        self._set("raydist_workers", facts.world_size)

    @override
    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Exports a log line."""
        self._set("raydist_step", step)
        self._set("raydist_heartbeat_timestamp_seconds", time.time())
        for metric, gauge in _OF_LOG_LINE.items():
            if metric in metrics:
                self._set(gauge, metrics[metric])

    @override
    def on_stored(self, step: int, upload_s: float) -> None:
        """Exports a checkpoint that is complete."""
        self._set("raydist_checkpoint_step", step)
        self._set("raydist_checkpoint_timestamp_seconds", time.time())
        self._set("raydist_checkpoint_upload_seconds", upload_s)

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(float(value), tags=self._tags)
