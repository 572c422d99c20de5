import hashlib
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydist.checkpoint import files
from raydist.checkpoint.files import FileRecord, HashingWriter, VerifiedReader, open_verified, record_of_bytes
from raydist.core.errors import CheckpointError

CONTENT = bytes(range(256)) * 5


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", 100)
        yield


def _reader(content: bytes, record: FileRecord) -> VerifiedReader:
    return VerifiedReader(lambda start, stop: content[start:stop], path="shard", record=record)


@given(st.lists(st.binary(max_size=350), max_size=6))
def test_hashes_do_not_depend_on_how_a_file_is_written(pieces: list[bytes]) -> None:
    stream = io.BytesIO()
    writer = HashingWriter(stream)
    for piece in pieces:
        writer.write(piece)
    content = b"".join(pieces)
    assert stream.getvalue() == content
    assert writer.record() == record_of_bytes(content)
    assert writer.record().sha256 == hashlib.sha256(content).hexdigest()
    assert FileRecord.from_json(writer.record().to_json()) == writer.record()


@given(st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT)))
def test_every_range_is_what_was_written(one: int, other: int) -> None:
    start, stop = sorted((one, other))
    assert _reader(CONTENT, record_of_bytes(CONTENT)).read(start, stop) == CONTENT[start:stop]


def test_no_block_is_fetched_twice_in_a_row_and_neighbours_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCKS_PER_FETCH", 4)
    fetched: list[tuple[int, int]] = []

    def fetch(start: int, stop: int) -> bytes:
        fetched.append((start, stop))
        return CONTENT[start:stop]

    reader = VerifiedReader(fetch, path="shard", record=record_of_bytes(CONTENT))
    for start, stop in ((0, 30), (30, 130), (150, 700), (650, 1280)):
        assert reader.read(start, stop) == CONTENT[start:stop]
    assert fetched == [(0, 100), (100, 200), (200, 600), (600, 700), (700, 1100), (1100, 1280)]


@given(st.integers(0, len(CONTENT) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_found_by_whoever_reads_its_block_and_only_by_them(at: int, bit: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[at] ^= 1 << bit
    reader = _reader(bytes(damaged), record_of_bytes(CONTENT))
    for start in range(0, len(CONTENT), 100):
        stop = min(start + 100, len(CONTENT))
        if start <= at < stop:
            with pytest.raises(CheckpointError, match="damaged"):
                reader.read(stop - 1, stop)
        else:
            assert reader.read(start, stop) == CONTENT[start:stop]


def test_a_range_beyond_the_file_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    record = record_of_bytes(CONTENT)
    with pytest.raises(CheckpointError, match="shorter"):
        _reader(CONTENT, record).read(0, len(CONTENT) + 1)
    with pytest.raises(CheckpointError, match="missing"), open_verified(str(tmp_path / "shard"), record=record):
        pass
    with pytest.raises(CheckpointError, match="missing"):
        record.check_size(str(tmp_path / "shard"))
