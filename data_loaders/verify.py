"""Reads a whole dataset and says what is damaged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from data_loaders.cache import NodeCache
from data_loaders.dataset import open_dataset
from data_loaders.shards import check_shard
from raydist.core import storage
from raydist.core.errors import DataError, RaydistError


@dataclass(frozen=True)
class VerifyReport:
    """What was read and found whole."""

    num_shards: int
    num_documents: int
    num_tokens: int


def verify_dataset(path: str, *, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Checks the manifest, the tokenizer, and every shard: hashes, offsets, token ids.

    Args:
        path: dataset directory.
        progress: called with (shards checked, shards in all).

    Raises:
        DataError: naming every damaged shard.
    """
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_dataset(path, cache=NodeCache(scratch))
        manifest = dataset.manifest
        vocab_size = dataset.tokenizer().vocab_size
        if vocab_size != manifest.vocab_size:
            raise DataError(
                "the tokenizer's vocabulary is not the manifest's",
                where=dataset.path,
                found=vocab_size,
                expected=manifest.vocab_size,
            )
        damage = []
        for done, entry in enumerate(manifest.shards):
            progress(done, len(manifest.shards))
            try:
                check_shard(
                    storage.join(dataset.path, entry.name), entry=entry, vocab_size=manifest.vocab_size, scratch=scratch
                )
            except RaydistError as error:
                damage.append(f"{entry.name}: {error.what}; found {error.found}, expected {error.expected}")
    if damage:
        raise DataError(
            f"{len(damage)} of {len(manifest.shards)} shards are damaged",
            where=dataset.path,
            found="\n".join(damage),
            fix="restore these files, or prepare the dataset again with --overwrite",
        )
    return VerifyReport(len(manifest.shards), manifest.num_documents, manifest.num_tokens)
