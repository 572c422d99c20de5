from __future__ import annotations

from pathlib import Path

import pytest

from raydist.core.errors import ConfigError
from tests.training.cases import recipe_of


def scaled(num_workers: int, min_workers: int | None, batch_rows: int = 24) -> dict[str, object]:
    smallest = "null" if min_workers is None else min_workers
    return {
        "scaling.num_workers": num_workers,
        "scaling.min_workers": smallest,
        "training.batch_rows": batch_rows,
        "training.microbatch_rows": 2,
    }


@pytest.mark.parametrize(
    ("num_workers", "min_workers", "sizes"),
    [(4, None, [4]), (4, 1, [1, 2, 3, 4]), (6, 2, [2, 3, 4, 6]), (12, 6, [6, 12]), (3, 3, [3])],
)
def test_world_sizes_are_those_that_divide_the_batch(
    num_workers: int, min_workers: int | None, sizes: list[int], tmp_path: Path
) -> None:
    config = recipe_of("data", tmp_path, **scaled(num_workers, min_workers)).config
    assert config.world_sizes() == sizes
    for size in sizes:
        assert config.training.batch_rows % (size * config.training.microbatch_rows) == 0


@pytest.mark.parametrize(
    ("num_workers", "min_workers", "words"),
    [
        (5, None, "multiple of scaling.num_workers x"),
        (6, 5, "multiple of scaling.min_workers x"),
        (2, 4, "min_workers=4 must not exceed num_workers=2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    num_workers: int, min_workers: int | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe_of("data", tmp_path, **scaled(num_workers, min_workers))


def test_the_number_of_workers_is_no_part_of_what_a_run_computes(tmp_path: Path) -> None:
    hashes = {recipe_of("data", tmp_path, **scaled(*sizes)).config_hash for sizes in ((4, None), (4, 1), (2, 2))}
    assert len(hashes) == 1
