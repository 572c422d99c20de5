"""A loader reads far ahead of its shuffle window; what it holds on the node may not."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from data_loaders import cache as cache_module
from data_loaders import loader as loader_module
from data_loaders.cache import NodeCache
from data_loaders.loader import Loader
from data_loaders.mixture import DatasetWeight, Mixture, open_mixture
from data_loaders.order import OrderName
from data_loaders.shards import decompress_shard
from raydist.core.rows import Rows
from tests.data_loaders.conftest import write_dataset

SEQ_LEN, BATCH_ROWS, NUM_SHARDS, WINDOW_SHARDS = 64, 8, 12, 2
_LOOKS, _BETWEEN_LOOKS_S = 50, 0.01
SHARD_TOKENS = 21 * SEQ_LEN + 1  # rows of a window are no multiple of a batch: some steps lie in two windows


@dataclass
class Node:
    """The files of a cache folder that are there or still mapped, and the shards in the order they were fetched."""

    folder: Path
    fetched: list[str] = field(default_factory=list)
    most_mapped: int = 0
    most_bytes: int = 0

    def look(self) -> None:
        """Space is taken by files in the folder, and by unlinked ones as long as they are mapped.

        A thread of Arrow's may hold a file that was read for a moment longer than we do.
        """
        for _ in range(_LOOKS):
            maps = Path("/proc/self/maps").read_text().splitlines()
            mapped = {line.split(maxsplit=5)[5] for line in maps if str(self.folder) in line}
            gone = [path for path in mapped if path.endswith(" (deleted)")]
            if not gone:
                break
            time.sleep(_BETWEEN_LOOKS_S)
        sizes = {str(file): file.stat().st_size for file in self.folder.iterdir()}
        self.most_mapped = max(self.most_mapped, len(mapped))
        self.most_bytes = max(self.most_bytes, sum(sizes.values()) + len(gone) * max(sizes.values(), default=0))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Looks at the node before and after each fetch."""
    node = Node(tmp_path / "cache")

    def fetch(path: str, **options: object) -> None:
        node.look()
        decompress_shard(path, **options)  # type: ignore[arg-type]
        node.fetched.append(path)
        node.look()

    monkeypatch.setattr(cache_module, "decompress_shard", fetch)
    return node


@pytest.fixture
def open_tight(tmp_path: Path, node: Node) -> Callable[..., Mixture]:
    """Datasets of equal shards, with room on the node for one window of each."""

    def make(*weights: float, order: OrderName = "shuffled") -> Mixture:
        window_shards = WINDOW_SHARDS if order == "shuffled" else 1
        limit_bytes = 0
        for d in range(len(weights)):
            manifest = write_dataset(tmp_path / f"d{d}", lengths=[[SHARD_TOKENS]] * NUM_SHARDS, first_token=7 * d)
            limit_bytes += window_shards * manifest.shards[0].raw_bytes
        return open_mixture(
            [DatasetWeight(str(tmp_path / f"d{d}"), weight) for d, weight in enumerate(weights)],
            cache=NodeCache(str(node.folder), limit_bytes=limit_bytes),
            seq_len=SEQ_LEN,
            seed=1,
            order=order,
            window_shards=WINDOW_SHARDS,
        )

    return make


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize(("world_size", "chunk_tokens"), [(1, 1 << 19), (1, 24 * (SEQ_LEN + 1)), (4, 1 << 19)])
def test_a_window_is_fetched_when_a_step_needs_it(
    open_tight: Callable[..., Mixture],
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    order: OrderName,
    world_size: int,
    chunk_tokens: int,
) -> None:
    """Not before, each shard once an epoch, and never more of them mapped, or on the disk, than one window."""
    monkeypatch.setattr(loader_module, "_CHUNK_TOKENS", chunk_tokens)
    mixture = open_tight(1.0, order=order)
    window_shards = WINDOW_SHARDS if order == "shuffled" else 1
    num_steps = 2 * mixture.num_rows // BATCH_ROWS
    addresses = mixture.orders[0].locate(np.arange(num_steps * BATCH_ROWS))
    shards_N = addresses.epochs_N * NUM_SHARDS + addresses.shards_N
    place = {shard: place for place, shard in enumerate(dict.fromkeys(shards_N.tolist()))}
    windows_N = np.array([place[shard] // window_shards for shard in shards_N.tolist()])
    rank, rank_rows = world_size - 1, BATCH_ROWS // world_size
    loader: Loader[Rows] = Loader(
        mixture, batch_rows=BATCH_ROWS, rank=rank, world_size=world_size, num_steps=num_steps, prefetch_steps=0
    )
    for step, _ in enumerate(loader):
        node.look()
        first = step * BATCH_ROWS + rank * rank_rows
        num_begun = (windows_N[first : first + rank_rows].max() + 1) * window_shards
        assert len(node.fetched) <= num_begun
        assert len(node.fetched) > num_begun - 2 * window_shards
    assert len(node.fetched) == 2 * NUM_SHARDS
    for epoch in range(2):
        assert len(set(node.fetched[epoch * NUM_SHARDS : (epoch + 1) * NUM_SHARDS])) == NUM_SHARDS
    assert node.most_mapped == window_shards
    assert node.most_bytes <= mixture.datasets[0].cache.limit_bytes


@pytest.mark.parametrize(
    ("prefetch_steps", "chunk_rows", "weights"),
    [(0, 8192, (1, 1)), (2, 8192, (1, 1)), (0, 24, (8, 7)), (0, 24, (70, 71))],
)
def test_mixtures_hold_one_window_of_each_dataset(
    open_tight: Callable[..., Mixture],
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    prefetch_steps: int,
    chunk_rows: int,
    weights: tuple[float, ...],
) -> None:
    """Although their shuffle swaps samples of neighbouring windows, the more the longer its period is."""
    monkeypatch.setattr(loader_module, "_CHUNK_TOKENS", chunk_rows * (SEQ_LEN + 1))
    mixture = open_tight(*weights)
    expected = Loader(mixture, batch_rows=BATCH_ROWS)
    num_steps = mixture.num_rows // BATCH_ROWS
    loader: Loader[Rows] = Loader(mixture, batch_rows=BATCH_ROWS, num_steps=num_steps, prefetch_steps=prefetch_steps)
    seen = list(loader)
    node.look()
    assert node.most_mapped == 2 * WINDOW_SHARDS
    assert node.most_bytes <= mixture.datasets[0].cache.limit_bytes
    for step, rows in enumerate(seen):
        alone = expected.rows(first_sample=step * BATCH_ROWS)
        assert rows.tokens_BS.tolist() == alone.tokens_BS.tolist()
        assert rows.rows_B.tolist() == alone.rows_B.tolist()
