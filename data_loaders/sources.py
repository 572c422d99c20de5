"""Raw documents: text and code files, jsonl, jsonl.zst and parquet, from folders, globs and single files.

Every document has a stable id: its path below the source, and the line or row number in files that hold many.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from raydist.core import storage
from raydist.core.errors import DataError

_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.zst", ".ndjson.zst")
_PARQUET_SUFFIX = ".parquet"
_SKIPPED_FOLDERS = ("__pycache__", "node_modules")


@dataclass(frozen=True)
class Document:
    """One text. ``prompt`` comes before ``text`` and is never a training target."""

    id: str
    text: str
    prompt: str = ""


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    Attributes:
        path: where it is.
        name: the source folder's name and the path below it, ``/`` between parts; begins the ids of its documents.
        num_bytes: size.
        modified_ns: time of the last change; 0 in buckets.
    """

    path: str
    name: str
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Fields:
    """Names of the fields of jsonl records and the columns of parquet tables."""

    text: str = "text"
    prompt: str | None = None


def find_files(sources: Sequence[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[InputFile]:
    """The files of folders, globs and single files, in a stable order, each once.

    Patterns (``*.py``, ``test/*``) match the file's name or its path below the source; hidden files and caches are
    left out.

    Raises:
        DataError: a source does not exist, or nothing matches.
    """
    found: dict[str, InputFile] = {}
    for source in sources:
        label = _label(source)
        for file in _files_of(source):
            if _selected(file.name, include, exclude):
                found.setdefault(file.path, replace(file, name=f"{label}/{file.name}" if label else file.name))
    if not found:
        raise DataError(
            "no file matches",
            where=", ".join(sources),
            found=f"include {list(include) or 'all'}, exclude {list(exclude) or 'none'}",
            fix="check the patterns: they match file names or paths below the source",
        )
    return sorted(found.values(), key=lambda file: (file.name, file.path))


def read_documents(file: InputFile, *, fields: Fields) -> Iterator[Document]:
    """The documents of one file; a text file is one document. Files that are not UTF-8 text yield nothing.

    Raises:
        DataError: a damaged line or a missing field, with file and line.
    """
    if file.path.endswith(_JSONL_SUFFIXES):
        return _read_jsonl(file, fields)
    if file.path.endswith(_PARQUET_SUFFIX):
        return _read_parquet(file, fields)
    return _read_text(file)


def _files_of(source: str) -> Iterable[InputFile]:
    if storage.is_remote(source):
        names = storage.list_files(source)
        if not names and storage.exists(source):
            return [_remote_file(source, posixpath.basename(source))]
        found = [_remote_file(storage.join(source, name), name) for name in names]
    elif os.path.isdir(storage.local_path(source)):
        root = storage.local_path(source)
        found = [_local_file(os.path.join(root, name), name) for name in storage.list_files(root)]
    else:
        paths = sorted(path for path in glob.glob(os.path.expanduser(source), recursive=True) if os.path.isfile(path))
        root = os.path.dirname(source.split("*")[0]) if glob.has_magic(source) else os.path.dirname(source)
        found = [
            _local_file(storage.local_path(path), os.path.relpath(path, os.path.expanduser(root) or "."))
            for path in paths
        ]
    if not found:
        raise DataError("a source does not exist or is empty", where=source, fix="name a file, a folder or a glob")
    return found


def _label(source: str) -> str:
    """The name of a source folder, or of the folder that a glob or file is in."""
    if not storage.is_remote(source) and not os.path.isdir(storage.local_path(source)):
        source = os.path.dirname(storage.local_path(source).split("*")[0])
    return posixpath.basename(storage.normalize(source))


def _local_file(path: str, name: str) -> InputFile:
    try:
        stat = os.stat(path)
    except FileNotFoundError:  # a dangling link
        return InputFile(path, name.replace(os.sep, "/"), 0, 0)
    return InputFile(path, name.replace(os.sep, "/"), stat.st_size, stat.st_mtime_ns)


def _remote_file(path: str, name: str) -> InputFile:
    return InputFile(path, name, storage.size_bytes(path), 0)


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    parts = name.split("/")
    if any(part.startswith(".") and part not in (".", "..") for part in parts) or any(
        part in _SKIPPED_FOLDERS for part in parts
    ):
        return False

    def matches(pattern: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(parts[-1], pattern)

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def _read_text(file: InputFile) -> Iterator[Document]:
    try:
        text = storage.read_bytes(file.path).decode("utf-8")
    except (UnicodeDecodeError, FileNotFoundError):
        return
    if text and "\x00" not in text:
        yield Document(file.name, text)


def _read_jsonl(file: InputFile, fields: Fields) -> Iterator[Document]:
    with storage.open_read(file.path) as stream:
        for number, line in enumerate(_lines(stream, file), start=1):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(
                    "a line is not JSON", where=where, found=str(error), fix="mend or remove the line"
                ) from None
            if not isinstance(record, dict):
                raise DataError("a line is not a JSON object", where=where, found=type(record).__name__)
            document = _from_record(record, fields, document_id=f"{file.name}:{number}", where=where)
            if document.text:
                yield document


def _lines(stream: IO[bytes], file: InputFile) -> Iterator[str]:
    """Lines of a plain or compressed file; unlike zstandard's own reader, Arrow's reports a truncated frame."""
    import pyarrow as pa

    try:
        plain = pa.CompressedInputStream(stream, "zstd") if file.path.endswith(".zst") else stream
        yield from io.TextIOWrapper(plain, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "an input file is damaged", where=file.path, found=str(error), fix="fetch the file again"
        ) from None


def _read_parquet(file: InputFile, fields: Fields) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [fields.text, *([fields.prompt] if fields.prompt else [])]
    try:
        with storage.open_read(file.path) as stream:
            table = pq.ParquetFile(stream)
            missing = [name for name in columns if name not in table.schema_arrow.names]
            if missing:
                raise _missing_field(missing[0], table.schema_arrow.names, where=file.path)
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    where = f"{file.path}:{number}"
                    document = _from_record(record, fields, document_id=f"{file.name}:{number}", where=where)
                    number += 1
                    if document.text:
                        yield document
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            "an input file is damaged", where=file.path, found=str(error), fix="fetch the file again"
        ) from None


def _from_record(record: dict[str, Any], fields: Fields, *, document_id: str, where: str) -> Document:
    values = []
    for name in (fields.text, fields.prompt):
        if name is None:
            values.append("")
            continue
        if name not in record:
            raise _missing_field(name, list(record), where=where)
        if not isinstance(record[name], str | None):
            raise DataError(
                "a field is not text", where=where, found=f"{name}: {type(record[name]).__name__}", expected="a string"
            )
        values.append(record[name] or "")
    return Document(document_id, values[0], prompt=values[1])


def _missing_field(name: str, present: Sequence[str], *, where: str) -> DataError:
    return DataError(
        f"there is no field {name!r}",
        where=where,
        found="fields " + ", ".join(present),
        fix="name the field that holds the text: --text-field NAME",
    )
