"""Shards, manifests, the node cache and verification: what is written is read back, and damage is named."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from data_loaders.cache import NodeCache
from data_loaders.dataset import open_dataset
from data_loaders.inspect import describe_reading, length_histogram
from data_loaders.manifest import ShardEntry, read_manifest, write_manifest
from data_loaders.mixture import DatasetWeight, open_mixture
from data_loaders.show import step_documents
from data_loaders.verify import verify_dataset
from raydist.core.errors import DataError

SHARD = "shard-00000.arrow.zst"


def rewrite_manifest(path: str, **changes: object) -> None:
    """A consistent manifest with other values in its first shard's entry."""
    manifest = read_manifest(path)
    first = type(manifest.shards[0])(**{**vars(manifest.shards[0]), **changes})
    write_manifest(path, type(manifest)(**{**vars(manifest), "shards": (first, *manifest.shards[1:])}))


def test_shard_is_an_arrow_file_others_can_read(dataset: Callable[..., str]) -> None:
    path = dataset([[3, 0, 4]], mask_every=2)
    raw = zstandard.ZstdDecompressor().decompress(Path(path, SHARD).read_bytes())
    table = pa.ipc.open_file(raw).read_all()
    assert table.schema.field("tokens").type == pa.large_list(pa.uint16())
    assert table["tokens"].to_pylist() == [[0, 1, 2], [], [3, 4, 5, 6]]
    assert table["loss_mask"].to_pylist() == [[False, True, False], [], [True, False, True, False]]
    assert table["document_id"].to_pylist() == ["d0:0", "d0:1", "d0:2"]


def test_rows_are_views_of_the_mapped_file(dataset: Callable[..., str], cache: NodeCache) -> None:
    shard = open_dataset(dataset([[30, 20]]), cache=cache).shard(0)
    assert not shard.tokens_T.flags.owndata
    assert not shard.tokens_T.flags.writeable
    assert shard.offsets_D.tolist() == [0, 30, 50]
    rows = shard.rows(7)
    assert np.shares_memory(rows.tokens_RS, shard.tokens_T)
    assert rows.tokens_RS.tolist() == [list(range(7 * r, 7 * r + 8)) for r in range(7)]


def test_cuts_of_rows_are_the_boundaries_inside_them(dataset: Callable[..., str], cache: NodeCache) -> None:
    """A boundary at a row's last token cuts that row, and is the next row's beginning, which is no cut."""
    shard = open_dataset(dataset([[3, 0, 4, 1, 6, 14, 2]]), cache=cache).shard(0)
    boundaries = shard.boundaries_D.tolist()
    first_cuts = shard.rows(7).first_cuts_R1.tolist()
    assert boundaries == [0, 3, 7, 8, 14, 28, 30]
    for row in range(4):
        inside = [b for b in boundaries if 7 * row < b < 7 * row + 8]
        assert boundaries[first_cuts[row] : first_cuts[row + 1]] == inside


def test_missing_dataset_names_the_splits(dataset: Callable[..., str], cache: NodeCache, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset") as caught:
        open_dataset(str(tmp_path / "nowhere"), cache=cache)
    assert "raydist data prepare" in (caught.value.fix or "")
    dataset([[10]], name="both/train")
    with pytest.raises(DataError, match="no dataset") as caught:
        open_dataset(str(tmp_path / "both"), cache=cache)
    assert str(tmp_path / "both" / "train") in (caught.value.fix or "")


def test_edited_manifest_is_refused(dataset: Callable[..., str]) -> None:
    path = dataset([[10]])
    file = Path(path, "manifest.json")
    content = json.loads(file.read_text())
    for change, match in (
        ({"vocab_size": 7}, "own hash"),
        ({"format_version": 99}, "format version"),
        ({"shards": [{"name": "x"}]}, "damaged"),
        ({"shards": [{**content["shards"][0], "name": "../../x"}]}, "leaves its folder"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError, match=match):
            read_manifest(path)
    file.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_manifest(path)


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_bit(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def other_content(data: bytes) -> bytes:
    plain = zstandard.ZstdDecompressor().decompress(data)
    return zstandard.ZstdCompressor().compress(plain[:-1] + b"x")


def longer(data: bytes) -> bytes:
    return data + b"0"


@pytest.mark.parametrize(
    ("damage", "match"),
    [(truncate, "truncated"), (flip_a_bit, "hash"), (other_content, "hash|truncated|longer"), (longer, "longer")],
)
def test_damaged_shards_are_named_and_leave_nothing(
    dataset: Callable[..., str], cache: NodeCache, damage: Callable[[bytes], bytes], match: str
) -> None:
    path = dataset([[300], [300]])
    file = Path(path, SHARD)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=match) as caught:
        open_dataset(path, cache=cache).shard(0)
    assert SHARD in (caught.value.where or "")
    assert caught.value.found
    assert caught.value.expected
    assert os.listdir(cache.folder) == []
    with pytest.raises(DataError, match="1 of 2 shards") as caught:
        verify_dataset(path)
    assert SHARD in (caught.value.found or "")
    assert "shard-00001" not in (caught.value.found or "")


def test_hash_mismatch_shows_both_hashes(dataset: Callable[..., str], cache: NodeCache) -> None:
    path = dataset([[300]])
    expected = read_manifest(path).shards[0].compressed_sha256
    Path(path, SHARD).write_bytes(flip_a_bit(Path(path, SHARD).read_bytes()))
    with pytest.raises(DataError) as caught:
        open_dataset(path, cache=cache).shard(0)
    assert expected in (caught.value.expected or "")
    assert expected not in (caught.value.found or "")


def test_decompression_bomb_is_stopped(dataset: Callable[..., str], cache: NodeCache) -> None:
    path = dataset([[300]])
    bomb = zstandard.ZstdCompressor().compress(b"\0" * (64 << 20))
    Path(path, SHARD).write_bytes(bomb)
    rewrite_manifest(path, compressed_bytes=len(bomb))
    with pytest.raises(DataError, match="hash"):
        open_dataset(path, cache=cache).shard(0)


def test_missing_shard_is_named(dataset: Callable[..., str], cache: NodeCache) -> None:
    path = dataset([[300]])
    Path(path, SHARD).unlink()
    with pytest.raises(DataError, match="missing"):
        open_dataset(path, cache=cache).shard(0)


def test_verify_finds_ids_outside_the_vocabulary(dataset: Callable[..., str]) -> None:
    path = dataset([[300], [10]])
    assert verify_dataset(path).num_tokens == 310
    manifest = read_manifest(path)
    write_manifest(path, type(manifest)(**{**vars(manifest), "vocab_size": 255}))
    with pytest.raises(DataError, match="vocabulary"):
        verify_dataset(path)


def test_verify_checks_the_tokenizer(dataset: Callable[..., str]) -> None:
    path = dataset([[10]])
    file = Path(path, "tokenizer.json")
    file.write_text(file.read_text() + "\n")
    with pytest.raises(DataError, match="tokenizer is not the one"):
        verify_dataset(path)
    file.unlink()
    with pytest.raises(DataError, match="tokenizer is missing"):
        verify_dataset(path)


def test_cache_is_shared_and_evicts_the_least_recently_used(dataset: Callable[..., str], tmp_path: Path) -> None:
    path = dataset([[2000], [2000], [2000]])
    entries = read_manifest(path).shards
    size = entries[0].raw_bytes
    cache = NodeCache(str(tmp_path / "cache"), limit_bytes=2 * size)
    opened = open_dataset(path, cache=cache)
    opened.max_open_shards = 1
    opened.shard(0)
    opened.shard(1)
    os.utime(Path(cache.folder, entries[0].raw_sha256 + ".arrow"), (1, 1))
    kept = opened.shard(1)
    opened.shard(2)
    assert sorted(os.listdir(cache.folder)) == sorted(entry.raw_sha256 + ".arrow" for entry in entries[1:])
    assert kept.tokens_T[:3].tolist() == [31, 32, 33]
    Path(path, "shard-00002.arrow.zst").unlink()
    assert open_dataset(path, cache=NodeCache(cache.folder)).shard(2).tokens_T[0] == 62


def test_evicted_file_stays_readable_while_mapped(dataset: Callable[..., str], cache: NodeCache) -> None:
    shard = open_dataset(dataset([[2000]]), cache=cache).shard(0)
    os.unlink(shard.path)
    assert shard.tokens_T[-1] == 1999 % 256


def test_old_partials_are_removed_and_young_ones_left(tmp_path: Path) -> None:
    for name, age_s in (("a.arrow.partial-1", 3600), ("b.arrow.partial-2", 5)):
        file = tmp_path / name
        file.write_bytes(b"x")
        os.utime(file, (time.time() - age_s,) * 2)
    NodeCache(str(tmp_path))
    assert os.listdir(tmp_path) == ["b.arrow.partial-2"]


def test_dead_partial_of_another_process_does_not_block(dataset: Callable[..., str], cache: NodeCache) -> None:
    path = dataset([[300]])
    partial = Path(cache.folder, read_manifest(path).shards[0].raw_sha256 + ".arrow.partial-dead")
    partial.write_bytes(b"half")
    os.utime(partial, (time.time() - 60,) * 2)
    assert open_dataset(path, cache=cache).shard(0).tokens_T[0] == 0


def test_damaged_cache_file_is_named(dataset: Callable[..., str], cache: NodeCache) -> None:
    path = dataset([[300]])
    entry = read_manifest(path).shards[0]
    Path(cache.folder, entry.raw_sha256 + ".arrow").write_bytes(b"\0" * entry.raw_bytes)
    with pytest.raises(DataError, match="not a token shard") as caught:
        open_dataset(path, cache=cache).shard(0)
    assert cache.folder in (caught.value.where or "")


def test_inspect_counts_rows_and_what_is_dropped(dataset: Callable[..., str]) -> None:
    manifest = read_manifest(dataset([[21], [20], [5]]))
    reading = describe_reading(manifest, seq_len=10, num_steps=3, batch_rows=2)
    assert (reading.num_rows, reading.tokens_read, reading.shards_too_short) == (3, 30, 1)
    assert reading.tokens_dropped == 0 + 9 + 5
    assert reading.epochs == 2.0


def test_length_histogram_lines(dataset: Callable[..., str]) -> None:
    manifest = read_manifest(dataset([[1]]))
    counted = type(manifest)(**{**vars(manifest), "documents_by_log2_tokens": (0, 0, 4, 0, 2)})
    lines = [line.split() for line in length_histogram(counted, width=4)]
    assert lines == [
        ["4", "to", "7", "4", "####"],
        ["8", "to", "15", "0"],
        ["16", "to", "31", "2", "##"],
    ]


def test_show_finds_the_documents_of_a_step(dataset: Callable[..., str], cache: NodeCache) -> None:
    path = dataset([[5, 0, 9, 30]])
    mixture = open_mixture([DatasetWeight(path)], cache=cache, seq_len=10, seed=0, order="sequential")
    first, second = step_documents(mixture, first_sample=0, num_rows=2)
    assert [(segment.document_id, segment.num_tokens) for segment in first.segments] == [("d0:0", 5), ("d0:2", 6)]
    assert [(segment.document_id, segment.num_tokens) for segment in second.segments] == [("d0:2", 4), ("d0:3", 7)]
    assert first.segments[0].text == "\0\1\2\3\4"
    assert (second.row, second.epoch) == (1, 0)


def test_a_shard_that_another_process_evicts_before_it_is_opened_is_fetched_again(
    dataset: Callable[..., str], cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_dataset(dataset([[30, 20]]), cache=cache)
    whole = NodeCache.fetch
    fetched: list[str] = []

    def evicted_once(self: NodeCache, path: str, *, entry: ShardEntry) -> str:
        fetched.append(whole(self, path, entry=entry))
        if len(fetched) == 1:
            os.unlink(fetched[0])
        return fetched[-1]

    monkeypatch.setattr(NodeCache, "fetch", evicted_once)
    assert opened.shard(0).offsets_D.tolist() == [0, 30, 50]
    assert len(fetched) == 2


def test_a_shard_may_be_evicted_while_it_is_marked_as_used(
    dataset: Callable[..., str], cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dataset([[10]])
    (entry,) = read_manifest(path).shards
    plain = cache.fetch(path, entry=entry)
    monkeypatch.setattr(
        NodeCache, "_holds", lambda self, path, entry: not os.path.exists(path) or os.unlink(path) is None
    )
    assert cache.fetch(path, entry=entry) == plain
    monkeypatch.undo()
    assert not os.path.exists(plain)
