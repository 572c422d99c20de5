"""The loop: read, step, log, validate, save. Everything that waits for the device happens at steps known in advance."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raydist.checkpoint.agreement import on_any_worker
from raydist.checkpoint.checkpointer import Checkpointer
from raydist.checkpoint.schedule import SaveSchedule
from raydist.config.schema import RunConfig
from raydist.core.dist import Workers
from raydist.core.errors import NonFiniteError
from raydist.tracking.base import Tracker
from raydist.training.batches import StepBatch
from raydist.training.hooks import Hook
from raydist.training.lr import learning_rate_factor
from raydist.training.meters import Meters
from raydist.training.preemption import Notice, wishes
from raydist.training.setup import Assembly
from raydist.training.step import NonFiniteGuard, evaluate, train_step
from raydist.training.throughput import utilisation_of


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
        notice: says when this process is about to be ended.

    Attributes:
        stopped_at: the step at which a hook ended the run, or None.
        interrupted_at: the step at which a notice ended the attempt, after a save, or None.
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
        notice: Notice = lambda: None,
    ) -> None:
        self.config = config
        self.parts = parts
        self.workers = workers
        self.checkpointer = checkpointer
        self.tracker = tracker
        self.hooks = hooks
        self.notice = notice
        self.schedule = SaveSchedule(
            every_steps=config.checkpoint.every_steps,
            every_minutes=config.checkpoint.every_minutes,
            keep_every_steps=config.checkpoint.keep_every_steps,
        )
        self.meters = Meters()
        self.guard = NonFiniteGuard.create(workers.device)
        self.clock = _Clock()
        self.utilisation = utilisation_of(config, parts.model.config, needs=parts.objective.needs, workers=workers)
        self.last_logged = 0
        self.stopped_at: int | None = None
        self.interrupted_at: int | None = None

    def run(
        self, batches: Iterator[StepBatch], *, start_step: int, unlogged: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Trains on ``batches``, the first of which is step ``start_step``, to the end; returns the last metrics.

        Ends earlier, with :attr:`stopped_at` set, where a hook asks for it, or with :attr:`interrupted_at` on a notice.

        Args:
            batches: of this rank.
            start_step: steps done before.
            unlogged: the metrics of step ``start_step`` that wait for its validation, which was interrupted.

        Raises:
            NonFiniteError: on every rank alike; the weights are those before the bad step.
        """
        training = self.config.training
        self.last_logged = start_step
        latest: dict[str, float] = {}
        self.clock.lap()
        if unlogged is not None and not self._catch_up(start_step, unlogged, latest):
            return latest
        for step in range(start_step, training.num_steps):
            factor = learning_rate_factor(training.learning_rate_schedule, step, num_steps=training.num_steps)
            learning_rate = training.optimizer.learning_rate * factor
            self.parts.optimizer.set_learning_rate(learning_rate)
            ballot = train_step(
                self.parts.model,
                self.parts.objective,
                self.parts.optimizer,
                next(batches),
                device=self.workers.device,
                clip_norm=training.optimizer.clip_norm,
                guard=self.guard,
                meters=self.meters,
                wishes=self._wishes(),
            )
            stop, save = ballot.read()
            if not self._after_step(step + 1, learning_rate, stop=stop, save=save, latest=latest):
                break
        return latest

    def _wishes(self) -> Sequence[float]:
        """Whether this rank has notice to stop, and whether a save is overdue for rank 0, or for one whose last save failed.

        Rank 0 is busy as long as it waits for the others; one that has failed may not have been able to tell it.
        """
        is_free = self.workers.is_first and not self.checkpointer.busy
        save = (is_free or self.checkpointer.has_failed) and self.schedule.is_overdue()
        return wishes(self.notice() is not None, save)

    def _after_step(self, done: int, learning_rate: float, *, stop: bool, save: bool, latest: dict[str, float]) -> bool:
        """Logs, validates and saves where ``done`` steps, the clock or a notice ask for it; False ends the attempt."""
        is_last = done == self.config.training.num_steps
        saves = is_last or save or stop or self.schedule.names(done)
        metrics: dict[str, float] = {}
        if saves or done % self.config.training.log_every_steps == 0:
            metrics.update(self._read_meters(done, learning_rate))
        paused_at = time.perf_counter()
        validated: dict[str, float] | None = {}
        if self._validates(done):
            validated = None if stop else self.validate()
        if validated is None:
            self._save(done, unlogged=metrics or self._read_meters(done, learning_rate))
        else:
            metrics.update(validated)
            if metrics:
                self._log(done, metrics)
                latest.update(metrics)
            if saves:
                self._save(done, validated=validated)
        self._report_stored()
        self.clock.exclude(paused_at)
        if validated is None or (stop and not is_last):
            self.interrupted_at = done
        elif self._validates(done) and self._stop_agreed(done, latest):
            self.stopped_at = done
        return self.interrupted_at is None and self.stopped_at is None

    def _catch_up(self, done: int, unlogged: Mapping[str, float], latest: dict[str, float]) -> bool:
        """Makes up for a validation that a notice cut off, and logs what waited for it; False ends the attempt."""
        paused_at = time.perf_counter()
        validated = self.validate()
        self.clock.exclude(paused_at)
        if validated is None:
            self.interrupted_at = done
            return False
        latest.update({**unlogged, **validated})
        self._log(done, latest)
        if self._stop_agreed(done, latest):
            self.stopped_at = done
        return self.stopped_at is None

    def _validates(self, done: int) -> bool:
        training = self.config.training
        every = training.validate_every_steps
        return every is not None and (done == training.num_steps or done % every == 0)

    def _stop_agreed(self, done: int, metrics: Mapping[str, float]) -> bool:
        """Rank 0's hooks decide; the others learn of it, so that none waits in a collective for ever."""
        paused_at = time.perf_counter()
        wanted = self.workers.is_first and any([hook.wants_stop(done, metrics) for hook in self.hooks])
        (agreed,) = on_any_worker(wanted)
        self.clock.exclude(paused_at)
        return agreed

    def _read_meters(self, done: int, learning_rate: float) -> dict[str, float]:
        num_steps, self.last_logged = done - self.last_logged, done
        metrics = self.meters.read()
        self._stop_if_not_finite()
        tokens_per_step = self.config.training.batch_rows * self.config.data.seq_len
        step_s = self.clock.lap() / num_steps
        metrics |= {
            "learning_rate": learning_rate,
            "tokens": float(done * tokens_per_step),
            "tokens_per_s": tokens_per_step / step_s,
            "step_s": step_s,
        }
        if self.utilisation is not None:
            metrics["mfu"] = self.utilisation.mfu(metrics["tokens_per_s"])
        return metrics

    def _stop_if_not_finite(self) -> None:
        bad_step = int(self.guard.first_bad_step)
        if bad_step >= 0:
            raise NonFiniteError(
                f"the gradient norm of step {bad_step} is not a number; no weight was written from that step on",
                where=f"optimizer step {bad_step}",
                found="NaN or infinity in the loss or its gradient",
                expected="finite numbers on all ranks",
                fix="look at what the step read: "
                f"raydist data show --run {shlex.quote(self.checkpointer.run_dir)} --step {bad_step}\n"
                "lower training.optimizer.learning_rate, then go on from the last checkpoint with --resume",
            )

    def validate(self) -> dict[str, float] | None:
        """Loss on the same rows with the same noise each time, whatever the world size; None if a notice cut it off."""
        if self.parts.validation is None:
            return {}
        validation = self.parts.validation
        batches = [validation.batch(index) for index in range(self.config.training.validation_batches)]
        metrics = evaluate(
            self.parts.model,
            validation.objective,
            batches,
            device=self.workers.device,
            interrupted=lambda: on_any_worker(self.notice() is not None)[0],
        )
        return None if metrics is None else {f"validation/{name}": value for name, value in metrics.items()}

    def _log(self, done: int, metrics: Mapping[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log_metrics(metrics, step=done)
        if self.workers.is_first:
            for hook in self.hooks:
                hook.on_log(done, metrics)

    def _save(
        self, done: int, *, validated: Mapping[str, float] | None = None, unlogged: Mapping[str, float] | None = None
    ) -> None:
        timings = self.checkpointer.save(
            done,
            model=self.parts.model,
            optimizer=self.parts.optimizer,
            trainer_state=self._trainer_state(done, validated=validated, unlogged=unlogged),
        )
        self.schedule.restart()
        if self.tracker is not None:
            stall = {"checkpoint/wait_s": timings.wait_s, "checkpoint/stage_s": timings.stage_s}
            self.tracker.log_metrics(stall, step=done)
        if self.workers.is_first:
            for hook in self.hooks:
                hook.on_checkpoint(done)

    def finish_saves(self) -> None:
        """Waits until the last save is complete on storage, and reports it.

        Raises:
            CheckpointError: it could not be stored.
        """
        try:
            self.checkpointer.wait()
        finally:
            self._report_stored()

    def _report_stored(self) -> None:
        """Metrics and hooks of the saves that ended since the last step; late by a step, but in the thread of the loop."""
        for result in self.checkpointer.take_results():
            stored = result.error is None
            if self.tracker is not None:
                upload = {"checkpoint/upload_s": result.upload_s, "checkpoint/held_s": result.held_s} if stored else {}
                self.tracker.log_metrics({"checkpoint/failed": float(not stored), **upload}, step=result.step)
            for hook in self.hooks if self.workers.is_first else ():
                if stored:
                    hook.on_stored(result.step, result.upload_s)
                else:
                    hook.on_save_failed(result.step)

    def _trainer_state(
        self, done: int, *, validated: Mapping[str, float] | None, unlogged: Mapping[str, float] | None
    ) -> dict[str, Any]:
        return {
            "samples_consumed": done * self.config.training.batch_rows,
            "data_hash": self.parts.data_hash,
            "seed": self.config.seed,
            **({"validation": dict(validated)} if validated else {}),
            **({} if unlogged is None else {"unlogged": dict(unlogged)}),
        }
