import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_loaders.sources import Document, Fields, find_files, read_documents
from raydist.core.errors import DataError


def documents(path: Path, **fields: str) -> list[Document]:
    [file] = find_files([str(path)])
    return list(read_documents(file, fields=Fields(**fields)))


def test_folders_globs_and_patterns(tmp_path: Path) -> None:
    root = tmp_path / "src"
    for name in ("a.py", "b.txt", "test/c.py", "deep/er/d.py", ".git/e.py", "__pycache__/f.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)

    def names(source: Path | str, **patterns: list[str]) -> list[str]:
        return [file.name for file in find_files([str(source)], **patterns)]

    assert names(root) == ["src/a.py", "src/b.txt", "src/deep/er/d.py", "src/test/c.py"]
    assert names(root, include=["*.py"], exclude=["test/*"]) == ["src/a.py", "src/deep/er/d.py"]
    assert names(root / "**" / "*.py") == ["src/a.py", "src/deep/er/d.py", "src/test/c.py"]
    assert names(root / "a.py") == ["src/a.py"]
    both = find_files([str(root), str(root / "a.py")])
    assert len(both) == 4


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_files([str(tmp_path / "nowhere")])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="no file matches"):
        find_files([str(tmp_path)], include=["*.py"])


def test_text_that_is_no_text_is_skipped(tmp_path: Path) -> None:
    for name, content in (("latin.txt", b"caf\xe9"), ("zero.txt", b"a\0b"), ("empty.txt", b"")):
        (tmp_path / name).write_bytes(content)
        assert documents(tmp_path / name) == []
    (tmp_path / "good.txt").write_text("caf\u00e9\r\n\u4e2d", newline="")
    assert documents(tmp_path / "good.txt")[0].text == "caf\u00e9\r\n\u4e2d"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    records = [{"text": "one\n\u2028two"}, {"text": ""}, {"text": "three", "ask": "why"}]
    plain = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode() + b"\n"
    file = tmp_path / f"d{suffix}"
    frames = [zstandard.ZstdCompressor().compress(piece) for piece in (plain[:9], plain[9:])]
    file.write_bytes(b"".join(frames) if suffix.endswith(".zst") else plain)
    assert [(d.id.split("/")[1], d.text) for d in documents(file)] == [
        (f"d{suffix}:1", "one\n\u2028two"),
        (f"d{suffix}:3", "three"),
    ]


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"ask": "why", "answer": "so"}\n{"ask": null, "answer": "x"}\n')
    found = documents(tmp_path / "d.jsonl", text="answer", prompt="ask")
    assert [(document.prompt, document.text) for document in found] == [("why", "so"), ("", "x")]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a", None, "c"], "n": [1, 2, 3]}), tmp_path / "d.parquet")
    assert [(d.id.split(":")[1], d.text) for d in documents(tmp_path / "d.parquet", text="body")] == [
        ("0", "a"),
        ("2", "c"),
    ]
    with pytest.raises(DataError, match="no field 'text'") as caught:
        documents(tmp_path / "d.parquet")
    assert "body" in (caught.value.found or "")


@pytest.mark.parametrize(
    ("name", "content", "match", "where"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "not JSON", "a.jsonl:2"),
        ("b.jsonl", b'["x"]\n', "not a JSON object", "b.jsonl:1"),
        ("c.jsonl", b'{"body": "x"}\n', "no field 'text'", "c.jsonl:1"),
        ("d.jsonl", b'{"text": 3}\n', "not text", "d.jsonl:1"),
        ("e.jsonl", b'{"text": "\xff"}\n', "damaged", "e.jsonl"),
        ("f.jsonl.zst", b"not zstd", "damaged", "f.jsonl.zst"),
        ("g.parquet", b"not parquet", "damaged", "g.parquet"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, match: str, where: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match) as caught:
        documents(tmp_path / name)
    assert (caught.value.where or "").endswith(where)


def test_truncated_zstd_is_damage_even_at_the_end_of_a_line(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    first = compressor.compress(b'{"text": "x"}\n') + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "d.jsonl.zst").write_bytes(first)
    with pytest.raises(DataError, match="damaged"):
        documents(tmp_path / "d.jsonl.zst")
    rest = compressor.compress(b'{"text": "y"}\n') + compressor.flush()
    (tmp_path / "d.jsonl.zst").write_bytes(first + rest)
    assert [document.text for document in documents(tmp_path / "d.jsonl.zst")] == ["x", "y"]
