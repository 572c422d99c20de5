"""Everything that decides the content of a prepared dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_loaders.parts import Encoding
from data_loaders.sources import Fields, InputFile
from raydist.core import storage


@dataclass(frozen=True)
class PrepareSettings:
    """Everything that decides the content of a dataset.

    Attributes:
        sources: folders, globs, files; local or in a bucket.
        tokenizer: see :func:`~data_loaders.tokenizer_sources.make_tokenizer`.
        name: what the dataset is called in reports.
        include: patterns of which a file must match one; empty for all.
        exclude: patterns of which a file may match none.
        fields: names of fields in jsonl and parquet inputs.
        validation_fraction: share of documents kept apart, by the hash of their content.
        split_seed: keys that hash, and so the order of the documents too.
        shard_bytes: size of a plain shard's token stream.
        append_bos: begin each document with the begin token.
        append_eos: end each document with the end token.
    """

    sources: tuple[str, ...]
    tokenizer: str
    name: str = "dataset"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    fields: Fields = field(default_factory=Fields)
    validation_fraction: float = 0.02
    split_seed: int = 0
    shard_bytes: int = 64 << 20
    append_bos: bool = False
    append_eos: bool = True

    @property
    def encoding(self) -> Encoding:
        """The part of the settings that single documents depend on."""
        return Encoding(self.fields, self.append_bos, self.append_eos, f"raydist split {self.split_seed}")


def settings_content(settings: PrepareSettings) -> dict[str, Any]:
    """The settings as JSON values."""
    return json.loads(json.dumps(asdict(settings)))


def settings_sha256(settings: PrepareSettings, files: Sequence[InputFile]) -> str:
    """Of the settings, the tokenizer file and the list of inputs with sizes and times."""
    content = settings_content(settings)
    tokenizer = settings.tokenizer
    path = (
        storage.join(tokenizer, "tokenizer.json")
        if storage.exists(storage.join(tokenizer, "tokenizer.json"))
        else tokenizer
    )
    content["tokenizer"] = storage.sha256(path) if storage.exists(path) else tokenizer
    content["files"] = [(file.name, file.num_bytes, file.modified_ns) for file in files]
    del content["sources"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
