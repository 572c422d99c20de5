import os
from collections.abc import Iterator

import pytest
import ray

from raydist.core.errors import DataError
from raydist.runtime.data_tasks import ray_map, ray_tasks

pytestmark = pytest.mark.ray


def square_in_another_process(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def refuse(number: int) -> int:
    if number == 3:
        raise DataError("number three", where="somewhere", found=3)
    return number


def submitted(count: int, log: list[int]) -> Iterator[int]:
    for number in range(count):
        log.append(number)
        yield number


def test_tasks_run_elsewhere_in_bounded_numbers_and_errors_come_back() -> None:
    was_running = ray.is_initialized()
    with ray_tasks(num_cpus=2) as map_tasks:
        assert map_tasks is ray_map
        results = list(map_tasks(square_in_another_process, list(range(7))))
        assert sorted(square for square, _ in results) == [n * n for n in range(7)]
        assert os.getpid() not in {pid for _, pid in results}
        log: list[int] = []
        for done, _ in enumerate(ray_map(square_in_another_process, submitted(10, log), max_in_flight=3), start=1):
            assert len(log) <= done - 1 + 3
        with pytest.raises(DataError, match="number three") as caught:
            list(ray_map(refuse, range(6)))
        assert caught.value.found == "3"
    assert ray.is_initialized() == was_running  # what was there stays, what was started here is gone
