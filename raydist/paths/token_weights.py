"""One number per token id, from a file that is data only: ``.npy`` without pickled objects, or ``.json``."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from raydist.core.errors import ConfigError
from raydist.core.storage import local_path


def read_token_weights(path: str, *, vocab_size: int, where: str) -> Tensor:
    """Non-negative weights, float64 ``[V]``; ids beyond the file's end have weight 0.

    Args:
        path: a local file.
        vocab_size: V; the file may be shorter, not longer.
        where: the recipe's key, for messages.

    Raises:
        ConfigError: the file cannot be read, is no list of numbers, or does not fit the vocabulary.
    """
    expected = f"a .npy or .json file of at most {vocab_size} non-negative numbers, not all 0"
    try:
        weights = _read(local_path(path))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"token weights cannot be read: {error}", where=where, found=path, expected=expected
        ) from None
    fits = weights.ndim == 1 and weights.size <= vocab_size and np.isfinite(weights).all()
    if not (fits and (weights >= 0).all() and weights.sum() > 0):
        raise ConfigError(
            "token weights do not fit",
            where=where,
            found=f"{path}: shape {list(weights.shape)}, smallest {weights.min(initial=np.inf)}",
            expected=expected,
        )
    padded = np.zeros(vocab_size)
    padded[: weights.size] = weights
    return torch.from_numpy(padded)


def _read(path: str) -> np.ndarray:
    if path.endswith(".json"):
        with open(path, encoding="utf-8") as file:
            return np.asarray(json.load(file), dtype=np.float64)
    return np.load(path, allow_pickle=False).astype(np.float64)
