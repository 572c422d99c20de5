"""Batches of rows for one rank, prepared ahead in a background thread."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from data_loaders.gather import Chunk, gather
from data_loaders.mixture import Mixture
from raydist.core.errors import ConfigError
from raydist.core.rows import Rows

Item = TypeVar("Item")
_POLL_S = 0.2
_JOIN_S = 5.0
_LOCATED_TOKENS = 1 << 25
_LOCATED_ROWS = 65_536
_CHUNK_TOKENS = 1 << 19


@dataclass(frozen=True)
class LoaderState:
    """All that a restart needs.

    Attributes:
        samples_consumed: samples that the consumer took, over all ranks, since the start of the run.
        manifest_hash: hash of the datasets, shares, seq_len, seed and order; another one means other data.
    """

    samples_consumed: int
    manifest_hash: str


class Loader(Generic[Item]):
    """Iterates over this rank's slice of each step's batch, for ever or for ``num_steps``.

    A step's batch is samples ``[s, s + batch_rows)`` of the mixture, whatever the world size; rank r takes the r-th
    of ``world_size`` equal slices. Iterating again goes on after the last item that was taken.

    Args:
        mixture: what sample ``i`` is.
        batch_rows: rows of a step over all ranks.
        rank: this worker's rank.
        world_size: number of workers; must divide ``batch_rows``.
        start_sample: samples consumed before (``LoaderState.samples_consumed``).
        start_step: the step number of the first batch.
        num_steps: batches to yield, or None for ever.
        prefetch_steps: transformed batches handed over at a time. Up to three such groups exist: one that is consumed, one
            that waits, one that is being made. Without a transform the groups are compact chunks of rows, whatever the
            number, which become batches when they are taken. 0 reads and transforms in the consumer's thread.
        transform: applied to each batch in the background thread, for example an objective's corruption.

    Raises:
        ConfigError: the batch does not divide.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        batch_rows: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        start_step: int = 0,
        num_steps: int | None = None,
        prefetch_steps: int = 2,
        transform: Callable[[Rows], Item] | None = None,
    ) -> None:
        if batch_rows % world_size:
            raise ConfigError(
                "the batch does not divide over the workers",
                where="training.batch_rows",
                found=f"{batch_rows} rows, {world_size} workers",
                expected="a multiple of the number of workers",
            )
        self._steps = _RankSteps(mixture, batch_rows, rank, world_size, start_step, start_sample, transform)
        self._num_steps = num_steps
        self._steps_consumed = 0
        self._prefetch_steps = prefetch_steps
        self._producer: _Producer | None = None

    @property
    def state(self) -> LoaderState:
        """What the consumer took so far; batches that were only prefetched do not count."""
        consumed = self._steps.start_sample + self._steps_consumed * self._steps.batch_rows
        return LoaderState(consumed, self._steps.mixture.sha256)

    def rows(self, *, first_sample: int, step: int = 0) -> Rows:
        """This rank's rows of the batch that begins at a sample; reads at once, without the thread."""
        return next(self._steps.batches(first_sample, num_steps=1, first_step=step))

    def __iter__(self) -> Iterator[Item]:
        self.close()
        if self._prefetch_steps == 0:
            yield from self._without_thread()
            return
        producer = _Producer(
            self._steps, first=self._steps_consumed, stop=self._num_steps, group_steps=self._prefetch_steps
        )
        self._producer = producer
        try:
            while (group := producer.next_group()) is not None:
                for item in group:
                    if producer.stopped.is_set():
                        return
                    self._steps_consumed += 1
                    yield item
        finally:
            producer.close()

    def _without_thread(self) -> Iterator[Item]:
        for group in self._steps.groups(self._steps_consumed, stop=self._num_steps, group_steps=1):
            for item in group:
                self._steps_consumed += 1
                yield item

    def close(self) -> None:
        """Ends the background thread and drops what it prepared. The loader may be iterated again.

        A thread that sits in a read of a bucket that is away ends after it, without being waited for.
        """
        if self._producer is not None:
            self._producer.close()
            self._producer = None


@dataclass(frozen=True)
class _RankSteps:
    """What one rank reads in each step."""

    mixture: Mixture
    batch_rows: int
    rank: int
    world_size: int
    start_step: int
    start_sample: int
    transform: Callable[[Rows], Any] | None

    @property
    def rank_rows(self) -> int:
        return self.batch_rows // self.world_size

    def chunks(self, first_sample: int, *, num_steps: int) -> Iterator[Chunk]:
        """This rank's rows of consecutive steps; each chunk holds whole steps."""
        steps_K1 = np.arange(num_steps, dtype=np.int64)[:, None]
        samples_B = first_sample + self.rank * self.rank_rows + np.arange(self.rank_rows, dtype=np.int64)
        chunk_steps = max(1, _CHUNK_TOKENS // (self.mixture.seq_len + 1) // self.rank_rows)
        samples_N = (steps_K1 * self.batch_rows + samples_B).reshape(-1)
        return gather(self.mixture, samples_N, chunk_rows=chunk_steps * self.rank_rows, step_rows=self.rank_rows)

    def batches(self, first_sample: int, *, num_steps: int, first_step: int) -> Iterator[Rows]:
        """The same as batches."""
        return itertools.chain.from_iterable(self._by_chunk(first_sample, num_steps=num_steps, first_step=first_step))

    def _by_chunk(self, first_sample: int, *, num_steps: int, first_step: int) -> Iterator[Iterator[Rows]]:
        """Nothing else holds a chunk, so that the next one may take its place in memory."""
        for chunk in self.chunks(first_sample, num_steps=num_steps):
            next_step = first_step + len(chunk.rows_N) // self.rank_rows
            yield chunk.batches(self.rank_rows, first_step=first_step)
            first_step = next_step
            del chunk

    def _located_steps(self) -> int:
        """Steps located at once: bounded in memory, and in the epochs of a tiny dataset that they span.

        Addresses only; what is open meanwhile is bounded by :func:`~data_loaders.gather.gather`.
        """
        num_rows = min(_LOCATED_ROWS, _LOCATED_TOKENS // (self.mixture.seq_len + 1), self.mixture.num_rows)
        return max(1, num_rows // self.rank_rows)

    def groups(self, first: int, *, stop: int | None, group_steps: int) -> Iterator[Iterable[Any]]:
        """The batches of steps ``[first, stop)`` after the start; the first comes as soon as it can.

        Without a transform a group is a whole chunk, whose batches are made by the thread that takes them.
        """
        num_steps = 1
        while stop is None or first < stop:
            num_steps = num_steps if stop is None else min(num_steps, stop - first)
            first_sample = self.start_sample + first * self.batch_rows
            where = {"num_steps": num_steps, "first_step": self.start_step + first}
            if self.transform is None:
                yield from self._by_chunk(first_sample, **where)
            else:
                items = map(self.transform, self.batches(first_sample, **where))
                while group := list(itertools.islice(items, group_steps)):
                    yield group
            first += num_steps
            num_steps = self._located_steps()


class _Producer:
    """The background thread. It hands over groups of steps, so that a hand-over costs little per step."""

    def __init__(self, steps: _RankSteps, *, first: int, stop: int | None, group_steps: int) -> None:
        self.stopped = threading.Event()
        self._groups: queue.Queue[Iterable[Any] | BaseException | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(
            target=_produce,
            args=(steps, first, stop, group_steps, self._groups, self.stopped),
            name="raydist-loader",
            daemon=True,
        )
        self._thread.start()

    def next_group(self) -> Iterable[Any] | None:
        group = None if self.stopped.is_set() else self._groups.get()
        if isinstance(group, BaseException):
            self.close()
            raise group
        return group

    def close(self) -> None:
        self.stopped.set()
        self._thread.join(timeout=_JOIN_S)


def _produce(
    steps: _RankSteps,
    first: int,
    stop: int | None,
    group_steps: int,
    groups: queue.Queue[Iterable[Any] | BaseException | None],
    stopped: threading.Event,
) -> None:
    torch.set_grad_enabled(False)
    try:
        for group in steps.groups(first, stop=stop, group_steps=group_steps):
            if not _hand_over(group, groups, stopped):
                return
        _hand_over(None, groups, stopped)
    except BaseException as error:
        _hand_over(error, groups, stopped)


def _hand_over(
    group: Iterable[Any] | BaseException | None,
    groups: queue.Queue[Iterable[Any] | BaseException | None],
    stopped: threading.Event,
) -> bool:
    """Puts a group; False if the consumer is gone."""
    while not stopped.is_set():
        try:
            groups.put(group, timeout=_POLL_S)
        except queue.Full:
            continue
        return True
    return False
