"""The source law: which token stands at a position when nothing of the data is there yet (t = 0)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import StrictModel
from raydist.config.registries import SOURCES
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from raydist.paths.on_device import OnDevice
from raydist.paths.token_weights import read_token_weights


class SourceLaw(ABC):
    """A law of one token; draws are inverse transforms of uniforms in [0, 1)."""

    vocab_size: int
    absorbing_id: int | None = None
    """The only token of the law, where there is but one that no data holds."""

    def in_context(self, tokens_BL: Tensor, *, given_BL: Tensor) -> SourceLaw:
        """The law of these rows; itself where it does not depend on them."""
        return self

    @abstractmethod
    def draw(self, uniforms_BL: Tensor) -> Tensor:
        """Tokens, int64 ``[B, L]``."""

    @abstractmethod
    def draw_other(self, current_BL: Tensor, *, uniforms_BL: Tensor) -> Tensor:
        """Tokens of the law given that they differ from the current ones; where there are none, the current ones."""

    @abstractmethod
    def probability(self, tokens_BL: Tensor) -> Tensor:
        """The probability of tokens, float64, the shape of the tokens."""

    def dense(self, tokens_X: Tensor) -> Tensor:
        """The law at positions shaped like the tokens, float64 ``[X, V]``. For oracles and small vocabularies."""
        shape = tokens_X.shape
        every_XV = torch.arange(self.vocab_size, device=tokens_X.device).expand(*shape, self.vocab_size)
        return self.probability(every_XV.reshape(*shape[:1], -1)).reshape(every_XV.shape)


class UniformLaw(SourceLaw):
    """Every token but the mask id with the same probability."""

    def __init__(self, ids: TokenIds) -> None:
        self.vocab_size = ids.vocab_size
        self._excluded = ids.mask
        self._num_tokens = ids.vocab_size - (ids.mask is not None)

    def draw(self, uniforms_BL: Tensor) -> Tensor:
        """``floor(u K)``, counted past the mask id."""
        return self._past_mask(_pick(uniforms_BL, self._num_tokens))

    def draw_other(self, current_BL: Tensor, *, uniforms_BL: Tensor) -> Tensor:
        """One of the K - 1 others, or of all K for a current mask."""
        ranks_BL = current_BL if self._excluded is None else current_BL - (current_BL > self._excluded).long()
        outside_BL = torch.zeros_like(current_BL, dtype=torch.bool)
        if self._excluded is not None:
            outside_BL = current_BL == self._excluded
        others_BL = self._num_tokens - (~outside_BL).long()
        picked_BL = _pick(uniforms_BL, others_BL)
        picked_BL = picked_BL + ((picked_BL >= ranks_BL) & ~outside_BL).long()
        return torch.where(others_BL > 0, self._past_mask(picked_BL), current_BL)

    def probability(self, tokens_BL: Tensor) -> Tensor:
        """``1 / K``, and 0 for the mask id."""
        same_BL = torch.full(tokens_BL.shape, 1 / self._num_tokens, dtype=torch.float64, device=tokens_BL.device)
        return same_BL if self._excluded is None else same_BL.masked_fill(tokens_BL == self._excluded, 0.0)

    def _past_mask(self, ranks_BL: Tensor) -> Tensor:
        return ranks_BL if self._excluded is None else ranks_BL + (ranks_BL >= self._excluded).long()


class TableLaw(SourceLaw):
    """A law given by a table ``[V]`` of probabilities."""

    def __init__(self, probabilities_V: Tensor, *, absorbing_id: int | None = None) -> None:
        self.vocab_size = probabilities_V.shape[0]
        self.absorbing_id = absorbing_id
        self._probabilities = OnDevice(probabilities_V.double())
        self._cumulative = OnDevice(torch.cat([torch.zeros(1).double(), probabilities_V.double().cumsum(0)]))

    def draw(self, uniforms_BL: Tensor) -> Tensor:
        """The first token whose cumulative probability is above the uniform."""
        cumulative = self._cumulative(uniforms_BL.device)
        return _lookup(cumulative, uniforms_BL.double() * cumulative[-1])

    def draw_other(self, current_BL: Tensor, *, uniforms_BL: Tensor) -> Tensor:
        """The same on the cumulative probabilities with the current token's interval cut out."""
        cumulative = self._cumulative(current_BL.device)
        below_BL, above_BL = cumulative[current_BL], cumulative[current_BL + 1]
        left_BL = cumulative[-1] - (above_BL - below_BL)
        place_BL = uniforms_BL.double() * left_BL
        place_BL = torch.where(place_BL >= below_BL, place_BL + (above_BL - below_BL), place_BL)
        return torch.where(left_BL > 0, _lookup(cumulative, place_BL), current_BL)

    def probability(self, tokens_BL: Tensor) -> Tensor:
        """The table's entry."""
        return self._probabilities(tokens_BL.device)[tokens_BL]


class ContextLaw(SourceLaw):
    """For each row the empirical law of its given tokens; another law for rows without any.

    Args:
        sorted_BL: each row's given tokens in increasing order, then ``vocab_size`` as padding.
        counts_B1: how many tokens are given.
        otherwise: the law of rows without given tokens.
    """

    def __init__(self, *, sorted_BL: Tensor, counts_B1: Tensor, otherwise: SourceLaw) -> None:
        self.vocab_size = otherwise.vocab_size
        if sorted_BL.shape[1] == 0:  # nothing is given in any row, but something must be there to be gathered
            sorted_BL = sorted_BL.new_full((sorted_BL.shape[0], 1), otherwise.vocab_size)
        self._sorted_BL = sorted_BL
        self._counts_B1 = counts_B1
        self._otherwise = otherwise

    def draw(self, uniforms_BL: Tensor) -> Tensor:
        """A given token of the row, each place with the same probability."""
        tokens_BL = self._sorted_BL.gather(1, _pick(uniforms_BL, self._counts_B1.clamp(min=1)))
        return torch.where(self._counts_B1 > 0, tokens_BL, self._otherwise.draw(uniforms_BL))

    def draw_other(self, current_BL: Tensor, *, uniforms_BL: Tensor) -> Tensor:
        """The same over the places that hold another token."""
        below_BL, same_BL = self._places(current_BL)
        others_BL = self._counts_B1 - same_BL
        picked_BL = _pick(uniforms_BL, others_BL.clamp(min=1))
        picked_BL = torch.where(picked_BL >= below_BL, picked_BL + same_BL, picked_BL)
        tokens_BL = self._sorted_BL.gather(1, picked_BL.clamp(max=self._sorted_BL.shape[1] - 1))
        from_row_BL = torch.where(others_BL > 0, tokens_BL, current_BL)
        return torch.where(
            self._counts_B1 > 0, from_row_BL, self._otherwise.draw_other(current_BL, uniforms_BL=uniforms_BL)
        )

    def probability(self, tokens_BL: Tensor) -> Tensor:
        """The share of the row's given tokens."""
        _, same_BL = self._places(tokens_BL)
        shares_BL = same_BL.double() / self._counts_B1.clamp(min=1)
        return torch.where(self._counts_B1 > 0, shares_BL, self._otherwise.probability(tokens_BL))

    def _places(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """How many given tokens of the row are smaller, and how many are equal."""
        tokens_BL = tokens_BL.contiguous()
        below_BL = torch.searchsorted(self._sorted_BL, tokens_BL)
        return below_BL, torch.searchsorted(self._sorted_BL, tokens_BL, right=True) - below_BL


class PreviousLaw(UniformLaw):
    """Uniform until it is told the rows' given tokens, then their empirical law."""

    def in_context(self, tokens_BL: Tensor, *, given_BL: Tensor) -> SourceLaw:
        """The law of these rows."""
        sorted_BL = tokens_BL.masked_fill(~given_BL, self.vocab_size).sort(dim=1).values
        return ContextLaw(sorted_BL=sorted_BL, counts_B1=given_BL.sum(1, keepdim=True), otherwise=self)


def _pick(uniforms_BL: Tensor, num_choices: Tensor | int) -> Tensor:
    """``floor(u n)``, an index below n."""
    picked_BL = (uniforms_BL.double() * num_choices).long()
    return torch.minimum(picked_BL, torch.as_tensor(num_choices, device=picked_BL.device) - 1)


def _lookup(cumulative: Tensor, places_BL: Tensor) -> Tensor:
    """The token whose interval ``[cumulative[v], cumulative[v + 1])`` holds the place; never an empty interval."""
    largest = torch.nextafter(cumulative[-1], torch.zeros_like(cumulative[-1]))
    return torch.searchsorted(cumulative, places_BL.clamp(max=largest), right=True) - 1


class Source(StrictModel, ABC):
    """The base of a source's configuration; a subclass is registered under its ``name``."""

    name: str

    @abstractmethod
    def build(self, ids: TokenIds) -> SourceLaw:
        """The law on a vocabulary.

        Raises:
            ConfigError: the vocabulary lacks the mask id, or a file does not fit it.
        """


@SOURCES.register
class MaskSource(Source):
    """All positions hold the mask id."""

    name: Literal["mask"] = "mask"

    def build(self, ids: TokenIds) -> TableLaw:
        """The law; raises ConfigError for a vocabulary without a mask id."""
        if ids.mask is None:
            raise ConfigError(
                "the vocabulary has no mask token",
                where="objective.path.source.name",
                found="mask",
                expected="a mask id in the dataset's manifest.json, or another source",
                fix="prepare the dataset again (raydist data prepare adds one), or use source.name=uniform",
            )
        return TableLaw(_one_hot(ids.mask, vocab_size=ids.vocab_size), absorbing_id=ids.mask)


@SOURCES.register
class UniformSource(Source):
    """Every token but the mask with the same probability."""

    name: Literal["uniform"] = "uniform"

    def build(self, ids: TokenIds) -> UniformLaw:
        """The law."""
        return UniformLaw(ids)


@SOURCES.register
class GivenSource(Source):
    """A law from a file of token weights: probabilities or counts, raised to a power and normalised."""

    name: Literal["given"] = "given"
    path: str
    """A ``.npy`` array or a ``.json`` list of one non-negative number per token id. Missing last ids count as 0."""
    power: float = Field(default=1.0, ge=0)
    """Exponent of the weights; 1 keeps them, 0 is uniform over the tokens that occur. Shaul et al. 2025 build such laws."""

    def build(self, ids: TokenIds) -> TableLaw:
        """The law; raises ConfigError for a file that does not fit the vocabulary."""
        weights_V = read_token_weights(self.path, vocab_size=ids.vocab_size, where="objective.path.source.path")
        powered_V = torch.where(weights_V > 0, (weights_V / weights_V.max()) ** self.power, 0.0)
        return TableLaw(powered_V / powered_V.sum())


@SOURCES.register
class PreviousSource(Source):
    """Tokens of the row's own given context (the prompt), each place with the same probability.

    Our choice of the meaning of "previous tokens": a position starts as a copy of a token that the condition holds, so
    that generation begins on the prompt's words. Rows without a condition start from the uniform source. The law
    depends on the row, so a caller passes the condition to ``Path.in_context``.
    """

    name: Literal["previous"] = "previous"

    def build(self, ids: TokenIds) -> PreviousLaw:
        """The law."""
        return PreviousLaw(ids)


def _one_hot(token: int, *, vocab_size: int) -> Tensor:
    law_V = torch.zeros(vocab_size, dtype=torch.float64)
    law_V[token] = 1.0
    return law_V
