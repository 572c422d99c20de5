"""The sampler protocol that the command line, evaluation and in-loop samples share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydist.config.base import StrictModel


@dataclass(frozen=True)
class Generation:
    """What one prompt became.

    Attributes:
        tokens: generated ids, without the prompt, cut after the first stop id (which is kept).
        num_forwards: model forwards spent on this prompt up to its stop.
        revealed_at: for each generated token the forward, counted from 1, in which it was fixed.
        stopped: True where a stop id ended it, False where the length limit did.
    """

    tokens: list[int]
    num_forwards: int
    revealed_at: list[int]
    stopped: bool

    @property
    def tokens_per_forward(self) -> float:
        """What a forward yielded on average; 1 for autoregressive decoding."""
        return len(self.tokens) / max(1, self.num_forwards)


class Sampler(ABC):
    """Rolls a model out; holds its settings and the special ids, no state between calls."""

    @abstractmethod
    def generate(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Continues each prompt; prompts may differ in length. Never returns a mask token.

        Args:
            model: a :class:`raydist.models.decoder.Decoder` in evaluation mode.
            prompts: token ids, at least one each.
            max_new_tokens: an upper limit per prompt.
        """


class SamplerConfig(StrictModel, ABC):
    """The base of a sampler's configuration; a subclass is registered under its ``name``."""

    name: str

    @abstractmethod
    def build(self, *, stop_ids: Sequence[int], mask_id: int | None, seed: int) -> Sampler:
        """The sampler for a vocabulary.

        Raises:
            ConfigError: the vocabulary lacks a mask id that the sampler needs.
        """
