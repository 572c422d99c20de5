import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_loaders import loader as loader_module
from data_loaders.cache import NodeCache
from data_loaders.loader import Loader
from data_loaders.mixture import DatasetWeight, Mixture, open_mixture
from raydist.core.errors import ConfigError
from raydist.core.rows import Rows
from tests.data_loaders.conftest import write_dataset

SEQ_LEN = 8
LENGTHS_A = [[5, 60, 0, 35], [90], [1, 1, 1, 30, 100]]
LENGTHS_B = [[70, 70], [3] * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    write_dataset(root / "a", lengths=LENGTHS_A)
    write_dataset(root / "b", lengths=LENGTHS_B, first_token=100, mask_every=3)
    return root


def mixture_of(
    folder: Path, *names: str, seed: int = 0, weights: tuple[float, ...] = (2, 1), **options: object
) -> Mixture:
    parts = [DatasetWeight(str(folder / name), weight) for name, weight in zip(names, weights, strict=False)]
    return open_mixture(parts, cache=NodeCache(str(folder / "cache")), seq_len=SEQ_LEN, seed=seed, **options)  # type: ignore[arg-type]


def take(loader: Loader[Rows], count: int) -> list[Rows]:
    return list(itertools.islice(loader, count))


def key(rows: Rows) -> list[tuple[int, ...]]:
    """Row id, epoch and tokens of each row."""
    columns = [rows.rows_B[:, None], rows.epochs_B[:, None], rows.tokens_BS, rows.documents_BS.long()]
    return [tuple(row) for row in torch.cat(columns, dim=1).tolist()]


def brute_force_row(lengths: list[list[int]], row: int, *, first_token: int = 0) -> tuple[list[int], list[int]]:
    """Tokens and document numbers of a row, by walking over the documents."""
    for shard, documents in enumerate(lengths):
        num_rows = max(sum(documents) - 1, 0) // SEQ_LEN
        if row < num_rows:
            owner = [d for d, length in enumerate(documents) for _ in range(length)]
            owners = owner[row * SEQ_LEN : row * SEQ_LEN + SEQ_LEN + 1]
            numbers = [sorted(set(owners)).index(d) for d in owners]
            stream = [(first_token + 31 * shard + p) % 256 for p in range(sum(documents))]
            return stream[row * SEQ_LEN : row * SEQ_LEN + SEQ_LEN + 1], numbers
        row -= num_rows
    raise AssertionError("no such row")


def test_rows_equal_brute_force(folder: Path) -> None:
    mixture = mixture_of(folder, "a")
    loader = Loader(mixture, batch_rows=mixture.num_rows)
    rows = loader.rows(first_sample=0)
    assert sorted(rows.rows_B.tolist()) == list(range(mixture.num_rows))
    for n, row in enumerate(rows.rows_B.tolist()):
        assert (rows.tokens_BS[n].tolist(), rows.documents_BS[n].tolist()) == brute_force_row(LENGTHS_A, row)
    assert rows.loss_mask_BS is None
    dtypes = [tensor.dtype for tensor in (rows.tokens_BS, rows.documents_BS, rows.rows_B, rows.epochs_B)]
    assert dtypes == [torch.int64, torch.int16, torch.int64, torch.int64]


@pytest.mark.parametrize(("seq_len", "dtype"), [(32_766, torch.int16), (32_767, torch.int32), (32_768, torch.int32)])
def test_rows_with_as_many_documents_as_tokens(
    dataset: Callable[..., str], cache: NodeCache, seq_len: int, dtype: torch.dtype
) -> None:
    """Document numbers pass what int16 holds exactly where the type changes."""
    path = dataset([[1] * (2 * seq_len + 1)])
    mixture = open_mixture([DatasetWeight(path)], cache=cache, seq_len=seq_len, seed=0)
    rows = Loader(mixture, batch_rows=2).rows(first_sample=0)
    assert rows.documents_BS.dtype == dtype
    assert rows.documents_BS.tolist() == [list(range(seq_len + 1))] * 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_same_rows_per_step_at_every_world_size(folder: Path, world_size: int, names: tuple[str, ...]) -> None:
    mixture = mixture_of(folder, *names)
    expected = [key(rows) for rows in take(Loader(mixture, batch_rows=24), 6)]
    ranks = [take(Loader(mixture, batch_rows=24, rank=r, world_size=world_size), 6) for r in range(world_size)]
    for step in range(6):
        assert [row for r in range(world_size) for row in key(ranks[r][step])] == expected[step]
        assert {ranks[r][step].step for r in range(world_size)} == {step}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_every_row_exactly_once_an_epoch(folder: Path, world_size: int) -> None:
    mixture = mixture_of(folder, "a")
    num_steps = mixture.num_rows
    loaders = [
        Loader(mixture, batch_rows=24, rank=r, world_size=world_size, num_steps=num_steps) for r in range(world_size)
    ]
    steps = zip(*loaders, strict=True)
    seen = [
        pair
        for step in steps
        for rows in step
        for pair in zip(rows.epochs_B.tolist(), rows.rows_B.tolist(), strict=True)
    ]
    assert sorted(seen) == [(epoch, row) for epoch in range(24) for row in range(mixture.num_rows)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(consumed=st.integers(0, 40), prefetch=st.integers(0, 5), world_size=st.sampled_from([1, 2, 3]))
def test_restart_goes_on_exactly(folder: Path, consumed: int, prefetch: int, world_size: int) -> None:
    mixture = mixture_of(folder, "a", "b", weights=(1, 1))
    straight = [key(rows) for rows in take(Loader(mixture, batch_rows=6), consumed + 3)]
    first = Loader(mixture, batch_rows=6, rank=world_size - 1, world_size=world_size, prefetch_steps=prefetch)
    take(first, consumed)
    state = first.state
    assert state.samples_consumed == 6 * consumed
    assert state.manifest_hash == mixture.sha256
    again = Loader(
        mixture, batch_rows=6, start_sample=state.samples_consumed, start_step=consumed, prefetch_steps=prefetch
    )
    resumed = take(again, 3)
    assert [key(rows) for rows in resumed] == straight[consumed:]
    assert [rows.step for rows in resumed] == [consumed, consumed + 1, consumed + 2]


def test_iterating_again_goes_on(folder: Path) -> None:
    mixture = mixture_of(folder, "a")
    straight = [key(rows) for rows in take(Loader(mixture, batch_rows=4), 5)]
    loader = Loader(mixture, batch_rows=4)
    assert [key(rows) for rows in take(loader, 2) + take(loader, 3)] == straight
    assert key(loader.rows(first_sample=4, step=1)) == straight[1]
    assert key(loader.rows(first_sample=8)) == straight[2]


def test_two_epochs_have_different_order(folder: Path) -> None:
    mixture = mixture_of(folder, "a")
    loader = Loader(mixture, batch_rows=mixture.num_rows)
    first, second = (loader.rows(first_sample=step * mixture.num_rows) for step in (0, 1))
    assert first.rows_B.tolist() != second.rows_B.tolist()
    assert set(second.epochs_B.tolist()) == {1}


def test_mixture_keeps_exact_counts_and_masks(folder: Path) -> None:
    mixture = mixture_of(folder, "a", "b", weights=(3, 1))
    first_row_b = int(mixture.first_rows_D[1])
    for rows in take(Loader(mixture, batch_rows=8), 10):
        from_b = rows.rows_B >= first_row_b
        assert int(from_b.sum()) == 2
        assert rows.loss_mask_BS is not None
        assert bool(rows.loss_mask_BS[~from_b].all())
        for n in np.flatnonzero(from_b.numpy()):
            tokens, numbers = brute_force_row(LENGTHS_B, int(rows.rows_B[n]) - first_row_b, first_token=100)
            assert rows.tokens_BS[n].tolist() == tokens
            assert rows.documents_BS[n].tolist() == numbers
            assert rows.loss_mask_BS[n].sum() == sum(1 for p in _positions(tokens, rows, n, first_row_b) if p % 3)


def _positions(tokens: list[int], rows: Rows, n: int, first_row_b: int) -> range:
    local = int(rows.rows_B[n]) - first_row_b
    rows_of_first_shard = (sum(LENGTHS_B[0]) - 1) // SEQ_LEN
    local = local if local < rows_of_first_shard else local - rows_of_first_shard
    return range(local * SEQ_LEN, local * SEQ_LEN + len(tokens))


def test_num_steps_ends_the_iteration(folder: Path) -> None:
    loader = Loader(mixture_of(folder, "a"), batch_rows=4, num_steps=5, prefetch_steps=3)
    assert [rows.step for rows in loader] == [0, 1, 2, 3, 4]
    assert list(loader) == []
    assert loader.state.samples_consumed == 20


def test_transform_runs_in_the_background(folder: Path) -> None:
    def transform(rows: Rows) -> tuple[str, int]:
        return threading.current_thread().name, rows.step

    loader = Loader(mixture_of(folder, "a"), batch_rows=4, num_steps=3, transform=transform)
    assert list(loader) == [("raydist-loader", 0), ("raydist-loader", 1), ("raydist-loader", 2)]


def test_errors_reach_the_consumer_and_threads_end(folder: Path) -> None:
    def transform(rows: Rows) -> Rows:
        if rows.step == 2:
            raise ValueError("step 2")
        return rows

    loader = Loader(mixture_of(folder, "a"), batch_rows=4, transform=transform, prefetch_steps=1)
    with pytest.raises(ValueError, match="step 2"):
        take(loader, 3)
    assert loader.state.samples_consumed == 8
    assert loader_threads() == []


def test_close_ends_the_thread(folder: Path) -> None:
    loader = Loader(mixture_of(folder, "a"), batch_rows=4)
    iterator: Iterator[Rows] = iter(loader)
    next(iterator)
    assert len(loader_threads()) == 1
    loader.close()
    assert loader_threads() == []
    assert list(iterator) == []
    assert loader.state.samples_consumed == 4


def test_close_does_not_wait_for_a_read_that_hangs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_JOIN_S", 0.05)
    storage_is_back = threading.Event()

    def transform(rows: Rows) -> Rows:
        if rows.step == 1:
            storage_is_back.wait(timeout=60)
        return rows

    loader = Loader(mixture_of(folder, "a"), batch_rows=4, transform=transform, prefetch_steps=1)
    next(iter(loader))
    (thread,) = loader_threads()
    loader.close()
    assert thread.is_alive()
    storage_is_back.set()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_chunks_end_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch holds does not depend on how many are read at once."""
    mixture = mixture_of(folder, "a", "b")
    expected = [key(rows) for rows in take(Loader(mixture, batch_rows=4), 12)]
    for chunk_rows in (1, 8, 12):
        monkeypatch.setattr(loader_module, "_LOCATED_ROWS", chunk_rows)
        transformed = Loader(mixture, batch_rows=4, num_steps=12, transform=key, prefetch_steps=3)
        assert list(transformed) == expected
        assert [key(rows) for rows in Loader(mixture, batch_rows=4, num_steps=12)] == expected


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "raydist-loader"]


def test_batch_must_divide(folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        Loader(mixture_of(folder, "a"), batch_rows=10, world_size=4)


def test_validation_is_sequential(folder: Path) -> None:
    rows = take(Loader(mixture_of(folder, "a", order="sequential"), batch_rows=4), 2)
    assert [row for batch in rows for row in batch.rows_B.tolist()] == list(range(8))


def test_window_larger_than_the_cache_of_open_shards(dataset: Callable[..., str], tmp_path: Path) -> None:
    """With room for exactly one window, shards come and go and the rows are still right."""
    lengths = [[100 + 10 * s] for s in range(9)]
    path = dataset(lengths)
    roomy = open_mixture([DatasetWeight(path)], cache=NodeCache(str(tmp_path / "roomy")), seq_len=SEQ_LEN, seed=0)
    sizes = sorted(shard.raw_bytes for shard in roomy.manifest.shards)
    tight_cache = NodeCache(str(tmp_path / "tight"), limit_bytes=sizes[-1] + sizes[-2])
    tight = open_mixture([DatasetWeight(path)], cache=tight_cache, seq_len=SEQ_LEN, seed=0, window_shards=2)
    seen = []
    loader = Loader(tight, batch_rows=8)
    for step in range(tight.num_rows):
        rows = loader.rows(first_sample=8 * step)
        stored = sum(file.stat().st_size for file in (tmp_path / "tight").iterdir())
        assert stored <= tight_cache.limit_bytes
        seen.extend(zip(rows.epochs_B.tolist(), rows.rows_B.tolist(), rows.tokens_BS.tolist(), strict=True))
    assert sorted(pair[:2] for pair in seen) == [(epoch, row) for epoch in range(8) for row in range(tight.num_rows)]
    assert all(tokens == brute_force_row(lengths, row)[0] for _, row, tokens in seen)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_samples_count_the_rows_of_the_run(folder: Path, world_size: int) -> None:
    """Consecutive inside a step, over all ranks, and from step to step."""
    mixture = mixture_of(folder, "a", "b")
    ranks = [take(Loader(mixture, batch_rows=8, rank=r, world_size=world_size), 5) for r in range(world_size)]
    for step in range(5):
        samples = torch.cat([rows[step].samples_B for rows in ranks])
        assert samples.tolist() == list(range(8 * step, 8 * step + 8))
    assert ranks[0][0].narrow(1, 2).samples_B.tolist() == [1]
