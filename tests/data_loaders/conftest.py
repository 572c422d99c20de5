"""Small datasets, written shard by shard or prepared from text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_loaders.cache import NodeCache
from data_loaders.manifest import Manifest, write_manifest
from data_loaders.shards import SUFFIX, ShardColumns, write_shard
from data_loaders.tokenizer_sources import byte_tokenizer

DocumentLengths = list[list[int]]


def write_dataset(
    folder: Path, *, lengths: DocumentLengths, first_token: int = 0, mask_every: int | None = None, name: str = "toy"
) -> Manifest:
    """Shards whose token at stream position p of shard s is ``(first_token + 31 s + p) % 256``."""
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    entries = []
    for index, documents in enumerate(lengths):
        num_tokens = sum(documents)
        stream = ((first_token + 31 * index + np.arange(num_tokens)) % 256).astype(np.uint16)
        mask = None if mask_every is None else np.arange(num_tokens) % mask_every != 0
        columns = ShardColumns(
            stream,
            np.concatenate([[0], np.cumsum(documents)]).astype(np.int64),
            [f"d{index}:{d}" for d in range(len(documents))],
            mask,
        )
        entries.append(write_shard(str(folder), name=f"shard-{index:05d}{SUFFIX}", columns=columns))
    manifest = Manifest(
        name=name,
        split="train",
        shards=tuple(entries),
        tokenizer_file="tokenizer.json",
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_kind="bytes",
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        token_dtype="uint16",
        has_loss_mask=mask_every is not None,
    )
    write_manifest(str(folder), manifest)
    return manifest


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(str(tmp_path / "cache"))


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., str]:
    """Writes a dataset and returns its path."""

    def make(
        lengths: DocumentLengths, *, name: str = "toy", first_token: int = 0, mask_every: int | None = None
    ) -> str:
        folder = tmp_path / name
        write_dataset(folder, lengths=lengths, first_token=first_token, mask_every=mask_every, name=name)
        return str(folder)

    return make
