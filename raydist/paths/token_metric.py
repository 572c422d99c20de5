"""Distances between tokens: from the rows of an embedding table, or from the numbers that the tokens stand for."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import StrictModel
from raydist.core.errors import ConfigError
from raydist.core.storage import local_path
from raydist.paths.on_device import OnDevice

_WEIGHTS_NAME, _INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_WHERE = "objective.path.metric"


class TokenMetric(ABC):
    """A distance ``d(x, y) >= 0`` with ``d(x, x) = 0``."""

    @abstractmethod
    def distances(self, tokens_N: Tensor) -> Tensor:
        """From each token to every token of the vocabulary, float32 or float64 ``[N, V]``."""


class ValueMetric(TokenMetric):
    """``(|x - y| / scale)^exponent`` on the token ids, which are taken for numbers."""

    def __init__(self, *, vocab_size: int, exponent: float, scale: float) -> None:
        self._values = OnDevice(torch.arange(vocab_size, dtype=torch.float64) / scale)
        self._exponent = exponent

    def distances(self, tokens_N: Tensor) -> Tensor:
        """float64 ``[N, V]``."""
        values_V = self._values(tokens_N.device)
        return (values_V[tokens_N][:, None] - values_V).abs() ** self._exponent


class EmbeddingMetric(TokenMetric):
    """``|e_x - e_y|^exponent`` between embeddings; tokens without a row have the zero vector.

    Args:
        table_RD: float32; R may be below the vocabulary's size, which pads it with zeros, or above.
        vocab_size: V.
        exponent: of the Euclidean distance.
        normalize: divide each row by its length.
    """

    def __init__(self, table_RD: Tensor, *, vocab_size: int, exponent: float, normalize: bool) -> None:
        table_VD = torch.zeros(vocab_size, table_RD.shape[1])
        num_rows = min(vocab_size, table_RD.shape[0])
        table_VD[:num_rows] = table_RD[:num_rows]
        self._table = OnDevice(torch.nn.functional.normalize(table_VD, dim=1) if normalize else table_VD)
        self._squares = OnDevice(self._table(table_VD.device).square().sum(1))
        self._exponent = exponent

    def distances(self, tokens_N: Tensor) -> Tensor:
        """float32 ``[N, V]``, by one matrix product."""
        table_VD, squares_V = self._table(tokens_N.device), self._squares(tokens_N.device)
        squared_NV = squares_V[tokens_N][:, None] + squares_V - 2 * table_VD[tokens_N] @ table_VD.t()
        return squared_NV.clamp(min=0) ** (self._exponent / 2)


class ValueMetricConfig(StrictModel):
    """Distance between token ids, for tokens that are numbers (pixels, bytes of audio)."""

    name: Literal["values"] = "values"
    exponent: float = Field(default=1.0, gt=0)
    """Of the absolute difference."""
    scale: float = Field(default=1.0, gt=0)
    """The difference that counts as 1."""

    def build(self, *, vocab_size: int) -> ValueMetric:
        """The metric."""
        return ValueMetric(vocab_size=vocab_size, exponent=self.exponent, scale=self.scale)


class EmbeddingMetricConfig(StrictModel):
    """Distance between the rows of a trained model's embedding table."""

    name: Literal["embedding"] = "embedding"
    path: str
    """A Hugging Face directory, or one ``.safetensors`` file."""
    tensor: str = "model.embed_tokens.weight"
    """The table's name in it."""
    normalize: bool = True
    """Divide each embedding by its length."""
    exponent: float = Field(default=2.0, gt=0)
    """Of the Euclidean distance. Published uses have 2 and 4; the paper's own is not known to us, 2 is our choice."""

    def build(self, *, vocab_size: int) -> EmbeddingMetric:
        """The metric; raises ConfigError where the table cannot be read."""
        table_RD = _read_table(local_path(self.path), self.tensor)
        return EmbeddingMetric(table_RD, vocab_size=vocab_size, exponent=self.exponent, normalize=self.normalize)


TokenMetricConfig = Annotated[ValueMetricConfig | EmbeddingMetricConfig, Field(discriminator="name")]


def _read_table(path: str, tensor: str) -> Tensor:
    """A two-dimensional float tensor as float32."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_file_with(path, tensor), framework="pt") as file:
            table = file.get_tensor(tensor)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"the embedding table cannot be read: {error}",
            where=f"{_WHERE}.path",
            found=f"{tensor} in {path}",
            expected="a safetensors file, or a folder with model.safetensors or its index, that holds the tensor",
            fix=f"set {_WHERE}.path and {_WHERE}.tensor",
        ) from None
    if table.ndim != 2 or not table.dtype.is_floating_point:
        raise ConfigError(
            "the embedding table is not a matrix of floats",
            where=f"{_WHERE}.tensor",
            found=f"{tensor}: {list(table.shape)} {table.dtype}",
            expected="[tokens, width]",
        )
    return table.float()


def _file_with(path: str, tensor: str) -> str:
    if not os.path.isdir(path):
        return path
    index = os.path.join(path, _INDEX_NAME)
    if not os.path.exists(index):
        return os.path.join(path, _WEIGHTS_NAME)
    with open(index, encoding="utf-8") as file:
        return os.path.join(path, os.path.basename(json.load(file)["weight_map"][tensor]))
