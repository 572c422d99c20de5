"""First half of preparation: a group of input files becomes one part file of encoded documents.

A part is an Arrow IPC file of several record batches, so that its size is not bounded by memory. Beside it lies a
small JSON record, written last: a part with a record is never made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data_loaders.sources import Document, Fields, InputFile, read_documents
from data_loaders.tokenizer import Tokenizer
from raydist.core import storage
from raydist.core.errors import DataError

_BATCH_CHARACTERS = 4 << 20
_BATCH_DOCUMENTS = 4096
HASH_BYTES = 16


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens.

    Attributes:
        fields: names of fields in jsonl and parquet inputs.
        append_bos: begin each document with the tokenizer's begin token.
        append_eos: end each document with the tokenizer's end token.
        hash_key: keys the documents' hash, which decides order and split.
    """

    fields: Fields
    append_bos: bool
    append_eos: bool
    hash_key: str


@dataclass(frozen=True)
class PartTask:
    """One group of input files.

    Attributes:
        files: read in this order.
        encoding: settings that the part's name depends on.
        tokenizer_path: a ``tokenizer.json`` that every worker can read.
        tokenizer_sha256: its hash.
        folder: where the part goes, readable by every worker.
    """

    files: tuple[InputFile, ...]
    encoding: Encoding
    tokenizer_path: str
    tokenizer_sha256: str
    folder: str

    @property
    def path(self) -> str:
        """The part file, named by a hash of everything that decides its content."""
        content = [[asdict(file) for file in self.files], asdict(self.encoding), self.tokenizer_sha256]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return storage.join(self.folder, f"part-{digest[:24]}.arrow")


@dataclass(frozen=True)
class PartRecord:
    """What a finished part holds."""

    path: str
    num_documents: int
    num_files_skipped: int


def read_record(task: PartTask) -> PartRecord | None:
    """The record of a part that an earlier run finished, or None."""
    try:
        return PartRecord(task.path, **storage.read_json(task.path + ".json"))
    except FileNotFoundError:
        return None


def make_part(task: PartTask) -> PartRecord:
    """Reads, encodes and hashes the documents of a group of files."""
    tokenizer = Tokenizer.load(task.tokenizer_path)
    num_documents = 0
    skipped = {file.name for file in task.files}
    with (
        storage.atomic_file(task.path) as partial,
        pa.ipc.new_file(partial, part_schema(tokenizer.vocab_size)) as writer,
    ):
        for documents in _batches(task, skipped):
            writer.write_batch(_encode(documents, tokenizer, task.encoding))
            num_documents += len(documents)
    record = {"num_documents": num_documents, "num_files_skipped": len(skipped)}
    storage.write_json(task.path + ".json", record)
    return PartRecord(task.path, **record)


def read_part(path: str) -> Any:
    """The part as a memory-mapped Arrow table: ``document_id``, ``hash``, ``prompt_tokens``, ``tokens``."""
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


def part_schema(vocab_size: int) -> Any:
    """The columns of a part."""
    return pa.schema(
        {
            "document_id": pa.large_string(),
            "hash": pa.binary(HASH_BYTES),
            "prompt_tokens": pa.int64(),
            "tokens": pa.large_list(pa.from_numpy_dtype(token_dtype(vocab_size))),
        }
    )


def token_dtype(vocab_size: int) -> str:
    """The smallest of the two token types that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def document_hash(document: Document, *, key: str) -> bytes:
    """A keyed hash of a document's content, not of its name."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES, key=key.encode()[:64])
    prompt = document.prompt.encode("utf-8", "surrogatepass")
    digest.update(len(prompt).to_bytes(8, "little") + prompt + document.text.encode("utf-8", "surrogatepass"))
    return digest.digest()


def _batches(task: PartTask, skipped: set[str]) -> Iterator[list[Document]]:
    """Documents in groups of bounded size; names of files that hold any leave ``skipped``."""
    group: list[Document] = []
    num_characters = 0
    for file in task.files:
        for document in read_documents(file, fields=task.encoding.fields):
            skipped.discard(file.name)
            group.append(document)
            num_characters += len(document.text) + len(document.prompt)
            if num_characters >= _BATCH_CHARACTERS or len(group) >= _BATCH_DOCUMENTS:
                yield group
                group, num_characters = [], 0
    if group:
        yield group


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, encoding: Encoding) -> Any:
    texts = tokenizer.encode_batch([document.text for document in documents])
    has_prompts = any(document.prompt for document in documents)
    prompts = tokenizer.encode_batch([document.prompt for document in documents]) if has_prompts else [[]] * len(texts)
    before = _special(tokenizer.special_ids.bos, encoding.append_bos, "begin-of-text", "--bos")
    after = _special(tokenizer.special_ids.eos, encoding.append_eos, "end-of-text", "--no-eos")
    lengths = [len(before) + len(prompt) + len(text) + len(after) for prompt, text in zip(prompts, texts, strict=True)]
    dtype = token_dtype(tokenizer.vocab_size)
    flat = np.concatenate(
        [
            np.array(ids, dtype=dtype)
            for prompt, text in zip(prompts, texts, strict=True)
            for ids in (before, prompt, text, after)
        ]
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    columns = {
        "document_id": pa.array([document.id for document in documents], type=pa.large_string()),
        "hash": pa.array(
            [document_hash(document, key=encoding.hash_key) for document in documents], type=pa.binary(HASH_BYTES)
        ),
        "prompt_tokens": pa.array([len(before) + len(prompt) if prompt else 0 for prompt in prompts], type=pa.int64()),
        "tokens": pa.LargeListArray.from_arrays(pa.array(offsets, type=pa.int64()), pa.array(flat)),
    }
    return pa.record_batch(columns, schema=part_schema(tokenizer.vocab_size))


def _special(token_id: int | None, wanted: bool, name: str, flag: str) -> list[int]:
    if not wanted:
        return []
    if token_id is None:
        raise DataError(
            f"the tokenizer has no {name} token", where=flag, fix=f"prepare the data without one: see {flag}"
        )
    return [token_id]
