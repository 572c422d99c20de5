from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders.cache import NodeCache
from data_loaders.manifest import SpecialIds, read_manifest, write_manifest
from data_loaders.mixture import DatasetWeight, Shares, open_mixture, period_counts
from raydist.core.errors import CapacityError, ConfigError, DataError


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    key=st.none() | st.integers(0, 2**64 - 1),
    num_periods=st.integers(1, 3),
)
def test_exact_counts_and_every_sample_once(weights: list[float], key: int | None, num_periods: int) -> None:
    shares = Shares(weights, key=key)
    datasets, samples = shares.assign(np.arange(num_periods * shares.period))
    for period in range(num_periods):
        part = slice(period * shares.period, (period + 1) * shares.period)
        assert np.bincount(datasets[part], minlength=len(weights)).tolist() == list(shares.counts)
    for dataset, count in enumerate(shares.counts):
        assert sorted(samples[datasets == dataset].tolist()) == list(range(num_periods * count))


@pytest.mark.parametrize(
    ("weights", "counts"),
    [((1, 1), (1, 1)), ((3, 1), (3, 1)), ((0.7, 0.2, 0.1), (7, 2, 1)), ((5,), (1,)), ((1, 2, 4), (143, 286, 571))],
)
def test_period_counts(weights: tuple[float, ...], counts: tuple[int, ...]) -> None:
    assert period_counts(weights) == counts


def test_tiny_weights_are_not_lost() -> None:
    assert min(period_counts((1e-6, 1.0))) == 1


def test_unshuffled_shares_are_spread_evenly() -> None:
    datasets, _ = Shares((3, 1), key=None).assign(np.arange(400))
    for stop in range(4, 400, 4):
        assert np.bincount(datasets[:stop]).tolist() == [3 * stop // 4, stop // 4]


def test_row_ids_are_unique_over_datasets(dataset: Callable[..., str], cache: NodeCache) -> None:
    paths = [dataset([[33], [17]], name="a"), dataset([[50]], name="b", first_token=7)]
    mixture = open_mixture([DatasetWeight(path) for path in paths], cache=cache, seq_len=4, seed=0)
    _, addresses = mixture.locate(np.arange(2 * mixture.num_rows))
    ids_of = {}
    for row, dataset_index, shard, local in zip(
        addresses.rows_N,
        mixture.locate(np.arange(2 * mixture.num_rows))[0],
        addresses.shards_N,
        addresses.local_rows_N,
        strict=True,
    ):
        assert ids_of.setdefault(int(row), (dataset_index, shard, local)) == (dataset_index, shard, local)
    assert sorted(ids_of) == list(range(mixture.num_rows))
    assert mixture.num_rows == 8 + 4 + 12


def test_hash_covers_what_decides_the_samples(dataset: Callable[..., str], cache: NodeCache) -> None:
    a, b = dataset([[40]], name="a"), dataset([[40]], name="b", first_token=1)

    def sha256(
        paths: tuple[str, ...] = (a,), weight: float = 1.0, seq_len: int = 4, seed: int = 0, window: int = 8
    ) -> str:
        parts = [DatasetWeight(path, weight) for path in paths]
        return open_mixture(parts, cache=cache, seq_len=seq_len, seed=seed, window_shards=window).sha256

    hashes = [
        sha256(),
        sha256((b,)),
        sha256((a, b)),
        sha256(weight=2),
        sha256(seq_len=5),
        sha256(seed=1),
        sha256(window=2),
    ]
    assert len(set(hashes)) == len(hashes)
    assert sha256() == hashes[0]


def test_different_tokenizers_are_refused(dataset: Callable[..., str], cache: NodeCache) -> None:
    a, b = dataset([[40]], name="a"), dataset([[40]], name="b")
    manifest = read_manifest(b)
    fields = {**vars(manifest), "special_ids": SpecialIds(eos=3)}
    write_manifest(b, type(manifest)(**fields))
    with pytest.raises(DataError, match="different tokenizers") as caught:
        open_mixture([DatasetWeight(a), DatasetWeight(b)], cache=cache, seq_len=4, seed=0)
    assert caught.value.where == b


def test_seq_len_too_long_names_the_longest(dataset: Callable[..., str], cache: NodeCache) -> None:
    path = dataset([[40], [60]])
    assert open_mixture([DatasetWeight(path)], cache=cache, seq_len=59, seed=0).num_rows == 1
    with pytest.raises(DataError, match="too long") as caught:
        open_mixture([DatasetWeight(path)], cache=cache, seq_len=60, seed=0)
    assert "59" in (caught.value.expected or "")


def test_cache_limit_is_refused_before_anything_is_fetched(dataset: Callable[..., str], tmp_path: Path) -> None:
    path = dataset([[4000], [5000], [6000]])
    sizes = [shard.raw_bytes for shard in read_manifest(path).shards]
    minimum = sizes[1] + sizes[2]

    def open_with(limit_bytes: int) -> None:
        cache = NodeCache(str(tmp_path / "small"), limit_bytes=limit_bytes)
        open_mixture([DatasetWeight(path)], cache=cache, seq_len=4, seed=0, window_shards=2)

    open_with(minimum)
    with pytest.raises(CapacityError) as caught:
        open_with(minimum - 1)
    assert str(minimum) in (caught.value.expected or "")
    assert list((tmp_path / "small").iterdir()) == []


def test_a_dataset_that_is_opened_twice_needs_the_larger_window(dataset: Callable[..., str], tmp_path: Path) -> None:
    """As training data and again, shard by shard, for validation."""
    path = dataset([[4000], [5000], [6000]])
    sizes = [shard.raw_bytes for shard in read_manifest(path).shards]
    cache = NodeCache(str(tmp_path / "small"), limit_bytes=sizes[1] + sizes[2])
    open_mixture([DatasetWeight(path)], cache=cache, seq_len=4, seed=0, window_shards=2)
    open_mixture([DatasetWeight(path)], cache=cache, seq_len=4, seed=0, window_shards=1)
    other = dataset([[100]], name="other")
    with pytest.raises(CapacityError) as caught:
        open_mixture([DatasetWeight(other)], cache=cache, seq_len=4, seed=0)
    least = sizes[1] + sizes[2] + read_manifest(other).shards[0].raw_bytes
    assert str(least) in (caught.value.expected or "")


def test_no_dataset_is_refused(cache: NodeCache) -> None:
    with pytest.raises(ConfigError):
        open_mixture([], cache=cache, seq_len=4, seed=0)
