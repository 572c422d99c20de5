"""Where others look into the loop. Hooks are called on rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RunFacts:
    """What is known when the loop starts.

    Attributes:
        name: the run's name.
        num_steps: optimizer steps of the whole run.
        start_step: the first step of this attempt.
        num_parameters: of the model.
        tokens_per_step: clean tokens that one step reads, over all workers.
        world_size: workers.
        warnings: what the user should know of how the attempt begins, e.g. a damaged checkpoint that was passed over.
    """

    name: str
    num_steps: int
    start_step: int
    num_parameters: int
    tokens_per_step: int
    world_size: int
    warnings: Sequence[str] = ()


class Hook:
    """Does nothing; override what you need. A hook must not raise for trouble of its own."""

    def on_start(self, facts: RunFacts) -> None:
        """Before the first step."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """After a log line's metrics are known; ``step`` steps are done."""

    def on_checkpoint(self, step: int) -> None:
        """After a checkpoint was handed over for writing."""

    def on_stored(self, step: int, upload_s: float) -> None:
        """After the checkpoint of ``step`` is complete on storage, ``upload_s`` seconds after it was handed over."""

    def on_save_failed(self, step: int) -> None:
        """After the checkpoint of ``step`` could not be stored; the run goes on, and the older ones stay valid."""

    def wants_stop(self, step: int, metrics: Mapping[str, float]) -> bool:
        """After a validation; True ends the run at this step on all ranks. May take its time: all ranks wait."""
        return False
