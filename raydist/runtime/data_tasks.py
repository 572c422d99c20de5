"""Preparation tasks as Ray tasks: the executor that ``data_loaders`` is handed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from raydist.core.errors import CapacityError, RaydistError
from raydist.runtime.cluster import connected

Task = TypeVar("Task")
Result = TypeVar("Result")
_TASKS_PER_CPU = 2


def ray_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, max_in_flight: int | None = None
) -> Iterator[Result]:
    """Results of ``function`` over tasks, in order of completion, with a bound on what is submitted at once.

    A lost worker's task is run again by Ray; an error of ours comes back as it was raised.

    Args:
        function: importable on the workers, without side effects that a second run would spoil.
        tasks: small, serializable descriptions.
        max_in_flight: tasks submitted and not finished; default twice the CPUs of the cluster.
    """
    import ray

    if max_in_flight is None:
        max_in_flight = _TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    remote = ray.remote(num_cpus=1)(function)
    waiting = iter(tasks)
    running: list[Any] = []
    try:
        while True:
            while len(running) < max_in_flight and (task := next(waiting, None)) is not None:
                running.append(remote.remote(task))
            if not running:
                return
            done, running = ray.wait(running, num_returns=1)
            yield _result(done[0])
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaydistError):
            raise error.cause from None
        raise
    except ray.exceptions.OutOfMemoryError as error:
        raise CapacityError(
            "a preparation task ran out of memory", found=str(error).splitlines()[0], fix="use fewer CPUs: --num-cpus 1"
        ) from None


@contextmanager
def ray_tasks(*, address: str | None = None, num_cpus: int | None = None) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yields :func:`ray_map` on a cluster, or on a Ray inside this process for as long as the block.

    A Ray that was running before is used and left running.
    """
    with connected(address=address, num_cpus=num_cpus):
        yield ray_map
