"""The sampler protocol that the command line, evaluation and in-loop samples share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydist.config.base import StrictModel
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds

if TYPE_CHECKING:
    from raydist.sampling.text_bytes.vocabulary import TextTokenizer

# What the models of our objectives are for; a model of an objective that is not listed is taken as it is.
_SAMPLER_OF = {
    "next_token": "autoregressive",
    "set_block": "set_block",
    "masked": "masked",
    "block": "block",
    "discrete_flow": "discrete_flow",
    "resample": "resample iterations=0",
    "edit_flow": "edit_flow",
}
CAUSAL_OBJECTIVES = frozenset({"next_token", "set_block"})
"""Objectives whose models predict the next token from what is before it."""


@dataclass(frozen=True)
class Trained:
    """What a sampler must know of a model beside its weights.

    Attributes:
        ids: vocabulary size and special ids.
        stop_ids: tokens that end a text.
        objective: the objective's configuration (``name`` and its fields), as JSON; None for a model that raydist did not
            train.
        seed: of the sampling noise.
        tokenizer: gives the tokenizer taken apart, for samplers that look at bytes; called only by them. None where the
            caller has none.
    """

    ids: TokenIds
    stop_ids: tuple[int, ...] = ()
    objective: Mapping[str, Any] | None = None
    seed: int = 0
    tokenizer: Callable[[], TextTokenizer] | None = None

    @classmethod
    def from_meta(
        cls,
        meta: Mapping[str, Any],
        *,
        vocab_size: int,
        seed: int,
        tokenizer: Callable[[], TextTokenizer] | None = None,
    ) -> Trained:
        """From the contents of ``raydist.json`` (:func:`raydist.models.hf.read_meta`)."""
        ids = TokenIds(
            vocab_size=vocab_size, **{name: meta["token_ids"][name] for name in ("bos", "eos", "mask", "pad")}
        )
        return cls(
            ids=ids, stop_ids=tuple(meta["stop_ids"]), objective=meta.get("objective"), seed=seed, tokenizer=tokenizer
        )

    def require_objective(self, objectives: Collection[str], *, sampler: str) -> None:
        """Lets pass models of these objectives, and of objectives that are not ours.

        Raises:
            ConfigError: the model was trained by another of our objectives.
        """
        name = (self.objective or {}).get("name")
        if name in _SAMPLER_OF and name not in objectives:
            raise ConfigError(
                "the model was trained for another sampler",
                where="sampler",
                found=f"{sampler} on a model trained by {name}",
                fix=f"use --sampler {_SAMPLER_OF[name]}",
            )

    def require_mask_id(self, *, sampler: str) -> int:
        """The vocabulary's mask id.

        Raises:
            ConfigError: there is none.
        """
        if self.ids.mask is None:
            raise ConfigError(
                "mask id missing: the model's vocabulary has no mask token",
                where="sampler",
                found=sampler,
                expected="a model whose raydist.json names a mask id, as every model trained from a recipe does",
                fix="use --sampler autoregressive",
            )
        return self.ids.mask

    def require_tokenizer(self, *, user: str) -> TextTokenizer:
        """The tokenizer taken apart.

        Raises:
            ConfigError: the caller gave none.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "decoding by bytes needs the model's tokenizer",
                where="sampler",
                found=user,
                expected="a model folder with its tokenizer.json",
                fix="sample from the run's model folder",
            )
        return self.tokenizer()


@dataclass(frozen=True)
class Generation:
    """What one prompt became.

    Attributes:
        tokens: generated ids, without the prompt, cut after the first stop id (which is kept).
        num_forwards: model forwards spent on this prompt up to its stop.
        revealed_at: for each generated token the forward, counted from 1, in which it was fixed.
        stopped: True where a stop id ended it, False where the length limit did.
        states: the whole generated sequence after each forward, for samplers that replace, insert or delete tokens, so that
            an animation can show it; None where ``revealed_at`` tells the whole story.
    """

    tokens: list[int]
    num_forwards: int
    revealed_at: list[int]
    stopped: bool
    states: list[list[int]] | None = None

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

    def infill(
        self, model: Any, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]], *, num_new_tokens: int
    ) -> list[Generation]:
        """Fills the gap between each prefix and its suffix; ``tokens`` are those of the gap.

        Args:
            model: a decoder in evaluation mode.
            prefixes: token ids before the gap; may be empty.
            suffixes: token ids behind the gap; may be empty.
            num_new_tokens: tokens in the gap; an upper limit for samplers that choose the length.

        Raises:
            ConfigError: this sampler only continues text.
        """
        raise ConfigError(
            "this sampler continues text and cannot fill a gap",
            where="sampler",
            found=type(self).__name__,
            expected="a sampler of a model that sees both sides, e.g. masked or discrete_flow",
        )


class SamplerConfig(StrictModel, ABC):
    """The base of a sampler's configuration; a subclass is registered under its ``name``."""

    name: str

    @property
    def setting(self) -> str | None:
        """The setting that trades forwards for quality, as ``gamma 0.35``; None where there is none."""
        return None

    def compared(self) -> list[SamplerConfig]:
        """What a comparison sets side by side, as a rule this sampler at several values of that setting."""
        return [self]

    def at(self, name: str, *values: Any) -> list[SamplerConfig]:
        """This sampler with one field at several values."""
        return [self.model_copy(update={name: value}) for value in values]

    @abstractmethod
    def build(self, trained: Trained) -> Sampler:
        """The sampler for a trained model.

        Raises:
            ConfigError: the vocabulary lacks a mask id that the sampler needs, or the model was trained for other samplers.
        """
