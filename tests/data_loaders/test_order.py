import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders.order import RowOrder

shard_rows = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda rows: sum(rows) > 0)


@settings(max_examples=60, deadline=None)
@given(
    rows=shard_rows,
    window=st.integers(1, 5),
    seed=st.integers(0, 10),
    order=st.sampled_from(["shuffled", "sequential"]),
)
def test_every_row_exactly_once_an_epoch(rows: list[int], window: int, seed: int, order: str) -> None:
    row_order = RowOrder(np.array(rows), seed=seed, window_shards=window, order=order)
    num_rows = sum(rows)
    found = row_order.locate(np.arange(3 * num_rows))
    assert found.epochs_N.tolist() == [epoch for epoch in range(3) for _ in range(num_rows)]
    for epoch in range(3):
        part = slice(epoch * num_rows, (epoch + 1) * num_rows)
        assert sorted(found.rows_N[part].tolist()) == list(range(num_rows))
        pairs = sorted(zip(found.shards_N[part].tolist(), found.local_rows_N[part].tolist(), strict=True))
        assert pairs == [(shard, row) for shard, count in enumerate(rows) for row in range(count)]


@settings(max_examples=30, deadline=None)
@given(rows=shard_rows, window=st.integers(1, 4), data=st.data())
def test_random_access_equals_reading_in_order(rows: list[int], window: int, data: st.DataObject) -> None:
    in_order = RowOrder(np.array(rows), seed=3, window_shards=window, order="shuffled").locate(np.arange(2 * sum(rows)))
    sample = data.draw(st.integers(0, 2 * sum(rows) - 1))
    alone = RowOrder(np.array(rows), seed=3, window_shards=window, order="shuffled").locate(np.array([sample]))
    assert alone.rows_N[0] == in_order.rows_N[sample]


@pytest.mark.parametrize("window", [1, 3, 4])
def test_rows_stay_in_their_window(window: int) -> None:
    rows = np.array([7, 11, 5, 9, 13, 8, 6, 10])
    shards = RowOrder(rows, seed=0, window_shards=window, order="shuffled").locate(np.arange(rows.sum())).shards_N
    seen: list[set[int]] = []
    position = 0
    while position < len(shards):
        group = set(shards[position : position + 1].tolist())
        while len(group) < min(window, len(rows) - sum(map(len, seen))) or position + sum(rows[list(group)]) > len(
            shards
        ):
            group = set(shards[position : position + sum(rows[list(group)]) + 1].tolist())
        size = int(sum(rows[list(group)]))
        assert set(shards[position : position + size].tolist()) == group
        seen.append(group)
        position += size
    assert sorted(shard for group in seen for shard in group) == list(range(len(rows)))
    assert all(len(group) <= window for group in seen)


def test_epochs_and_seeds_have_different_orders() -> None:
    rows = np.array([50, 50])
    found = RowOrder(rows, seed=0, window_shards=2, order="shuffled").locate(np.arange(200)).rows_N
    other = RowOrder(rows, seed=1, window_shards=2, order="shuffled").locate(np.arange(100)).rows_N
    assert found[:100].tolist() != found[100:].tolist()
    assert found[:100].tolist() != other.tolist()


def test_sequential_reads_rows_as_they_lie() -> None:
    found = RowOrder(np.array([3, 0, 2]), seed=5, window_shards=1, order="sequential").locate(np.arange(7))
    assert found.rows_N.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert found.shards_N.tolist() == [0, 0, 0, 2, 2, 0, 0]
