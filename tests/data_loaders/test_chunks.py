"""A loader reads many steps at once; none of it may show in the batches."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders import gather as gather_module
from data_loaders import loader as loader_module
from data_loaders.cache import NodeCache
from data_loaders.gather import gather
from data_loaders.loader import Loader
from data_loaders.manifest import read_manifest, write_manifest
from data_loaders.mixture import DatasetWeight, Mixture, open_mixture
from raydist.core.rows import Rows
from tests.data_loaders.conftest import write_dataset

SEQ_LEN, BATCH_ROWS, CHUNK_STEPS = 8, 4, 4
NUM_STEPS = 1 + 2 * CHUNK_STEPS + 1  # the first chunk is one step, the last one is cut short
LENGTHS_A = [[5, 30, 0, 6], [1] * 40, [60, 3], [33]]
LENGTHS_B = [[70, 2, 2], [3] * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chunks")
    write_dataset(root / "a", lengths=LENGTHS_A)
    write_dataset(root / "b", lengths=LENGTHS_B, first_token=100, mask_every=3)
    return root


def open_named(folder: Path, names: str, *, window_shards: int = 2) -> Mixture:
    parts = [DatasetWeight(str(folder / name)) for name in names]
    cache = NodeCache(str(folder / "cache"))
    return open_mixture(parts, cache=cache, seq_len=SEQ_LEN, seed=3, window_shards=window_shards)


def content(rows: Rows) -> tuple[object, ...]:
    """Everything that a batch holds."""
    mask = None if rows.loss_mask_BS is None else rows.loss_mask_BS.tolist()
    assert rows.samples_B is not None
    columns = (rows.tokens_BS, rows.documents_BS, rows.rows_B, rows.epochs_B, rows.samples_B)
    return (rows.step, mask, *(column.tolist() for column in columns))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("names", "window_shards"), [("a", 1), ("a", 3), ("b", 1), ("ab", 2)])
def test_restart_at_every_step_of_two_chunks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, names: str, window_shards: int, world_size: int
) -> None:
    """Chunks cross windows and epochs, and end between any two steps; each step alone is the oracle."""
    mixture = open_named(folder, names, window_shards=window_shards)
    assert mixture.num_rows < NUM_STEPS * BATCH_ROWS
    rank = world_size - 1
    alone = Loader(mixture, batch_rows=BATCH_ROWS, rank=rank, world_size=world_size)
    expected = [content(alone.rows(first_sample=step * BATCH_ROWS, step=step)) for step in range(NUM_STEPS)]
    rank_rows = BATCH_ROWS // world_size
    monkeypatch.setattr(loader_module, "_LOCATED_ROWS", CHUNK_STEPS * rank_rows)
    monkeypatch.setattr(loader_module, "_CHUNK_TOKENS", 3 * rank_rows * (SEQ_LEN + 1))  # copied as 3 steps and 1
    for step in range(NUM_STEPS + 1):
        resumed = Loader(
            mixture,
            batch_rows=BATCH_ROWS,
            rank=rank,
            world_size=world_size,
            start_sample=step * BATCH_ROWS,
            start_step=step,
            num_steps=NUM_STEPS - step,
            prefetch_steps=step % 2,
        )
        assert [content(rows) for rows in resumed] == expected[step:]
        assert resumed.state.samples_consumed == NUM_STEPS * BATCH_ROWS


def test_several_steps_are_read_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counting(mixture: Mixture, samples_N: np.ndarray, **rows: int) -> Iterator[gather_module.Chunk]:
        read.append(len(samples_N) // BATCH_ROWS)
        return gather(mixture, samples_N, **rows)

    monkeypatch.setattr(loader_module, "gather", counting)
    monkeypatch.setattr(loader_module, "_LOCATED_ROWS", CHUNK_STEPS * BATCH_ROWS)
    loader = Loader(open_named(folder, "ab"), batch_rows=BATCH_ROWS, num_steps=NUM_STEPS, prefetch_steps=0)
    assert len(list(loader)) == NUM_STEPS
    assert read == [1, CHUNK_STEPS, CHUNK_STEPS, 1]


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_batches_are_never_written_to_again(folder: Path, monkeypatch: pytest.MonkeyPatch, prefetch_steps: int) -> None:
    """Neither by the loader, when it reads on, nor through another batch."""
    monkeypatch.setattr(loader_module, "_LOCATED_ROWS", CHUNK_STEPS * BATCH_ROWS)
    loader = Loader(
        open_named(folder, "b"), batch_rows=BATCH_ROWS, num_steps=3 * NUM_STEPS, prefetch_steps=prefetch_steps
    )
    kept, as_they_came = [], []
    for rows in loader:
        kept.append(rows)
        as_they_came.append(content(rows))
    assert [content(rows) for rows in kept] == as_they_came
    for rows in kept[::2]:
        for column in (
            rows.tokens_BS,
            rows.documents_BS,
            rows.loss_mask_BS,
            rows.rows_B,
            rows.epochs_B,
            rows.samples_B,
        ):
            assert isinstance(column, torch.Tensor)
            column.fill_(0)
    assert [content(rows) for rows in kept[1::2]] == as_they_came[1::2]


def test_manifest_with_another_token_type(folder: Path, dataset: Callable[..., str], cache: NodeCache) -> None:
    """Token values count, not their bytes, if a manifest names a wider type than its shards have."""
    path = dataset(LENGTHS_A)
    manifest = read_manifest(path)
    write_manifest(path, type(manifest)(**{**vars(manifest), "token_dtype": "uint32"}))
    wide = open_mixture([DatasetWeight(path)], cache=cache, seq_len=SEQ_LEN, seed=3)
    samples_N = np.arange(wide.num_rows)
    (narrow,) = gather(open_named(folder, "a", window_shards=8), samples_N, chunk_rows=len(samples_N))
    (found,) = gather(wide, samples_N, chunk_rows=len(samples_N))
    assert found.tokens_NS.dtype == np.uint32
    assert found.tokens_NS.tolist() == narrow.tokens_NS.tolist()


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 7, 100])
def test_chunks_of_any_size_hold_the_same_rows_in_order(folder: Path, chunk_rows: int) -> None:
    mixture = open_named(folder, "ab")
    samples_N = np.arange(5, 5 + 2 * mixture.num_rows)
    (whole,) = gather(mixture, samples_N, chunk_rows=len(samples_N))
    chunks = list(gather(mixture, samples_N, chunk_rows=chunk_rows))
    assert [len(chunk.rows_N) for chunk in chunks[:-1]] == [chunk_rows] * (len(chunks) - 1)
    rows = [content(rows) for n, chunk in enumerate(chunks) for rows in chunk.batches(1, first_step=n * chunk_rows)]
    assert rows == [content(rows) for rows in whole.batches(1, first_step=0)]


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=40),
    stretch=st.sampled_from([1, 60, 20_000]),
)
def test_shards_are_visited_once_in_the_order_of_first_need(places: list[tuple[int, int]], stretch: int) -> None:
    """Whatever the number of shards, and with it the type that they are sorted in."""
    expected: dict[tuple[int, int], list[int]] = {}
    for sample, (dataset, shard) in enumerate(places):
        expected.setdefault((dataset, shard * stretch), []).append(sample)
    datasets_N = np.array([dataset for dataset, _ in places])
    shards_N = np.array([shard * stretch for _, shard in places])
    found = [((d, s), chosen_G.tolist()) for d, s, chosen_G in gather_module._groups(datasets_N, shards_N)]
    assert found == list(expected.items())
