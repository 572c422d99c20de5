"""Opens what a recipe reads, and checks that it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_loaders.cache import NodeCache
from data_loaders.manifest import Manifest
from data_loaders.mixture import DatasetWeight, Mixture, open_mixture
from data_loaders.order import OrderName
from raydist.config.schema import DataConfig, DatasetConfig
from raydist.core.token_ids import TokenIds
from raydist.core.units import parse_bytes


@dataclass(frozen=True)
class TrainingData:
    """The opened datasets of a run.

    Attributes:
        train: what the steps read.
        validation: what the in-loop validation reads, or None.
    """

    train: Mixture
    validation: Mixture | None

    @property
    def ids(self) -> TokenIds:
        """Vocabulary and special ids, fixed by the datasets' manifest."""
        return token_ids(self.train.manifest)


def token_ids(manifest: Manifest) -> TokenIds:
    """A manifest's ids as objectives read them."""
    special = manifest.special_ids
    return TokenIds(manifest.vocab_size, bos=special.bos, eos=special.eos, mask=special.mask, pad=special.pad)


def open_data(config: DataConfig, *, seed: int) -> TrainingData:
    """Opens train and validation mixtures in the node's cache.

    Raises:
        DataError: a dataset is missing or damaged, was prepared with another tokenizer, or is too short for ``seq_len``.
        CapacityError: the cache limit is below what a window of shards needs.
    """
    cache = NodeCache(config.cache_dir, limit_bytes=parse_bytes(config.cache_limit, where="data.cache_limit"))
    return TrainingData(
        train=_open(config, config.train, cache=cache, seed=seed, order="shuffled"),
        validation=_open(config, config.validation, cache=cache, seed=seed, order="sequential")
        if config.validation
        else None,
    )


def _open(
    config: DataConfig, parts: Sequence[DatasetConfig], *, cache: NodeCache, seed: int, order: OrderName
) -> Mixture:
    return open_mixture(
        [DatasetWeight(part.path, part.weight) for part in parts],
        cache=cache,
        seq_len=config.seq_len,
        seed=seed,
        order=order,
        window_shards=config.shuffle_window_shards,
    )
