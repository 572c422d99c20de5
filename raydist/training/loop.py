"""The loop: read, step, log, validate, save. Everything that waits for the device happens at steps known in advance."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from raydist.checkpoint.checkpointer import Checkpointer
from raydist.config.schema import RunConfig
from raydist.core.dist import Workers, max_over_ranks
from raydist.core.errors import NonFiniteError
from raydist.tracking.base import Tracker
from raydist.training.batches import StepBatch
from raydist.training.hooks import Hook
from raydist.training.lr import learning_rate_factor
from raydist.training.meters import Meters
from raydist.training.setup import Assembly
from raydist.training.step import NonFiniteGuard, evaluate, train_step


@dataclass
class _Clock:
    """Seconds spent in steps since the last log line, without validation and saving."""

    started: float = field(default_factory=time.perf_counter)
    paused_s: float = 0.0

    def exclude(self, since: float) -> None:
        self.paused_s += time.perf_counter() - since

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed = now - self.started - self.paused_s
        self.started, self.paused_s = now, 0.0
        return max(elapsed, 1e-9)


class TrainLoop:
    """Runs optimizer steps ``start_step .. num_steps - 1``.

    Args:
        config: the run's configuration.
        parts: model, optimizer, objective and loaders.
        workers: who this process is.
        checkpointer: saves training state.
        tracker: receives metrics on rank 0; None elsewhere.
        hooks: called on rank 0.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Assembly,
        *,
        workers: Workers,
        checkpointer: Checkpointer,
        tracker: Tracker | None,
        hooks: Sequence[Hook],
    ) -> None:
        self.config = config
        self.parts = parts
        self.workers = workers
        self.checkpointer = checkpointer
        self.tracker = tracker
        self.hooks = hooks
        self.meters = Meters()
        self.guard = NonFiniteGuard.create(workers.device)
        self.clock = _Clock()
        self.last_logged = 0
        self.stopped_at: int | None = None

    def run(self, batches: Iterator[StepBatch], *, start_step: int) -> dict[str, float]:
        """Trains on ``batches``, the first of which is step ``start_step``, to the end; returns the last metrics.

        Ends earlier, with :attr:`stopped_at` set, where a hook asks for it.

        Raises:
            NonFiniteError: on every rank alike; the weights are those before the bad step.
        """
        training = self.config.training
        self.last_logged = start_step
        latest: dict[str, float] = {}
        self.clock.lap()
        for step in range(start_step, training.num_steps):
            factor = learning_rate_factor(training.learning_rate_schedule, step, num_steps=training.num_steps)
            learning_rate = training.optimizer.learning_rate * factor
            self.parts.optimizer.set_learning_rate(learning_rate)
            train_step(
                self.parts.model,
                self.parts.objective,
                self.parts.optimizer,
                next(batches),
                device=self.workers.device,
                clip_norm=training.optimizer.clip_norm,
                guard=self.guard,
                meters=self.meters,
            )
            latest.update(self._after_step(step + 1, learning_rate))
            if self._validates(step + 1) and self._stop_agreed(step + 1, latest):
                self.stopped_at = step + 1
                break
        return latest

    def _after_step(self, done: int, learning_rate: float) -> dict[str, float]:
        """Logs, validates and saves where ``done`` steps ask for it."""
        training = self.config.training
        is_last = done == training.num_steps
        saves = is_last or done % self.config.checkpoint.every_steps == 0
        metrics: dict[str, float] = {}
        if is_last or saves or done % training.log_every_steps == 0:
            metrics.update(self._read_meters(done, learning_rate))
        paused_at = time.perf_counter()
        if self._validates(done):
            metrics.update(self.validate())
        if metrics:
            self._log(done, metrics)
        if saves:
            self._save(done)
        self.clock.exclude(paused_at)
        return metrics

    def _validates(self, done: int) -> bool:
        training = self.config.training
        every = training.validate_every_steps
        return every is not None and (done == training.num_steps or done % every == 0)

    def _stop_agreed(self, done: int, metrics: Mapping[str, float]) -> bool:
        """Rank 0's hooks decide; the others learn of it, so that none waits in a collective for ever."""
        paused_at = time.perf_counter()
        wanted = self.workers.is_first and any([hook.wants_stop(done, metrics) for hook in self.hooks])
        flag = torch.tensor(float(wanted), device=self.workers.device)
        agreed = bool(max_over_ranks(flag) > 0)
        self.clock.exclude(paused_at)
        return agreed

    def _read_meters(self, done: int, learning_rate: float) -> dict[str, float]:
        num_steps, self.last_logged = done - self.last_logged, done
        metrics = self.meters.read()
        self._stop_if_not_finite()
        tokens_per_step = self.config.training.batch_rows * self.config.data.seq_len
        step_s = self.clock.lap() / num_steps
        return {
            **metrics,
            "learning_rate": learning_rate,
            "tokens": float(done * tokens_per_step),
            "tokens_per_s": tokens_per_step / step_s,
            "step_s": step_s,
        }

    def _stop_if_not_finite(self) -> None:
        bad_step = int(self.guard.first_bad_step)
        if bad_step >= 0:
            raise NonFiniteError(
                f"the gradient norm of step {bad_step} is not a number; no weight was written from that step on",
                where=f"optimizer step {bad_step}",
                found="NaN or infinity in the loss or its gradient",
                expected="finite numbers on all ranks",
                fix=f"look at what the step read: raydist data show --run <run directory> --step {bad_step}\n"
                "lower training.optimizer.learning_rate, then go on from the last checkpoint with --resume",
            )

    def validate(self) -> dict[str, float]:
        """Loss on the same rows with the same noise each time, whatever the world size."""
        if self.parts.validation is None:
            return {}
        validation = self.parts.validation
        batches = [validation.batch(index) for index in range(self.config.training.validation_batches)]
        metrics = evaluate(self.parts.model, validation.objective, batches, device=self.workers.device)
        return {f"validation/{name}": value for name, value in metrics.items()}

    def _log(self, done: int, metrics: Mapping[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log_metrics(metrics, step=done)
        if self.workers.is_first:
            for hook in self.hooks:
                hook.on_log(done, metrics)

    def _save(self, done: int) -> None:
        timings = self.checkpointer.save(
            done, model=self.parts.model, optimizer=self.parts.optimizer, trainer_state=self._trainer_state(done)
        )
        if self.tracker is not None:
            stall = {"checkpoint/wait_s": timings.wait_s, "checkpoint/stage_s": timings.stage_s}
            self.tracker.log_metrics(stall, step=done)
        if self.workers.is_first:
            for hook in self.hooks:
                hook.on_checkpoint(done)

    def _trainer_state(self, done: int) -> dict[str, Any]:
        return {
            "samples_consumed": done * self.config.training.batch_rows,
            "data_hash": self.parts.data_hash,
            "seed": self.config.seed,
        }
