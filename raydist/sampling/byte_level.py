"""One byte at a time from a token model, exactly: the sampler over :mod:`raydist.sampling.text_bytes`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

from pydantic import Field

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from raydist.sampling.base import CAUSAL_OBJECTIVES, Generation, Sampler, SamplerConfig, Trained
from raydist.sampling.text_bytes.reader import ByteModel, ByteReader
from raydist.sampling.text_bytes.rollout import ByteGeneration, sample_bytes
from raydist.sampling.text_bytes.segmentation import Segmentation

_TEXT_STARTS = -1


class ByteLevel(Sampler):
    """Draws the next byte of the text that a token model describes; a prompt may end inside a word or a character.

    Ordinary decoding fixes the prompt's tokens and so excludes every text in which a token crosses the prompt's end.
    Here only the tokens before the last settled boundary are fixed (Phan et al. 2025, arXiv 2410.09303).
    """

    def __init__(
        self,
        config: ByteLevelConfig,
        *,
        segmentation: Segmentation,
        ids: TokenIds,
        stop_ids: Sequence[int],
        seed: int,
    ) -> None:
        self.config = config
        self.segmentation = segmentation
        self.ids = ids
        self.stop_ids = tuple(stop_ids)
        self.seed = seed
        self._strings = segmentation.tokenizer.tokens

    def byte_model(self, model: Any) -> ByteModel:
        """A decoder as this sampler reads it."""
        return ByteModel(
            model=model,
            segmentation=self.segmentation,
            ids=self.ids,
            stop_ids=self.stop_ids,
            exact=self.config.mode == "exact",
        )

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Continues the text of each prompt by at most ``max_new_tokens`` bytes, and so by no more tokens than that.

        Tokens of a prompt up to its last special one are taken as they are; the text of the others is what counts, not
        how it was cut. The new bytes come back as the encoder would write them on their own.
        """
        parts = [self._parts(prompt) for prompt in prompts]
        generations = self.generate_bytes(
            model,
            [text for _, text in parts],
            contexts=[context for context, _ in parts],
            max_new_bytes=max_new_tokens,
        )
        return [self._generation(generation) for generation in generations]

    def generate_bytes(
        self,
        model: Any,
        prompts: Sequence[bytes],
        *,
        max_new_bytes: int,
        contexts: Sequence[Sequence[int]] | None = None,
    ) -> list[ByteGeneration]:
        """Continues each text.

        Args:
            model: a decoder in evaluation mode.
            prompts: UTF-8, complete or cut anywhere; may be empty.
            max_new_bytes: bytes per text, at most.
            contexts: token ids before each text that are taken as they are; None for none.
        """
        if not prompts:
            return []
        contexts = [()] * len(prompts) if contexts is None else contexts
        reader = ByteReader(self.byte_model(model), prompts, contexts=contexts, max_new_bytes=max_new_bytes)
        return sample_bytes(
            reader,
            noise_keys=[[*context, _TEXT_STARTS, *text] for context, text in zip(contexts, prompts, strict=True)],
            seed=self.seed,
            max_new_bytes=max_new_bytes,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
        )

    def infill(
        self, model: Any, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]], *, num_new_tokens: int
    ) -> list[Generation]:
        """Fills the gap between each prefix and its suffix with at most ``num_new_tokens`` bytes.

        The suffix comes first, so that the gap follows the prefix without a seam and the prefix may end inside a word:
        ``special tokens of the prefix + infill_before_suffix + suffix + infill_before_prefix + prefix``.
        """
        before_suffix = self._special_ids(self.config.infill_before_suffix, key="infill_before_suffix")
        before_prefix = self._special_ids(self.config.infill_before_prefix, key="infill_before_prefix")
        parts = [self._parts(prefix) for prefix in prefixes]
        contexts = [
            [*context, *before_suffix, *suffix, *before_prefix]
            for (context, _), suffix in zip(parts, suffixes, strict=True)
        ]
        generations = self.generate_bytes(
            model, [text for _, text in parts], contexts=contexts, max_new_bytes=num_new_tokens
        )
        return [self._generation(generation) for generation in generations]

    def _parts(self, prompt: Sequence[int]) -> tuple[list[int], bytes]:
        """A prompt's tokens up to its last special one, and the text of the others."""
        start = max((place + 1 for place, token in enumerate(prompt) if token not in self._strings), default=0)
        return list(prompt[:start]), b"".join(self._strings[token] for token in prompt[start:])

    def _special_ids(self, names: Sequence[str], *, key: str) -> list[int]:
        found = {name: self.segmentation.tokenizer.token_id(name) for name in names}
        missing = [name for name, token_id in found.items() if token_id is None]
        if missing:
            raise ConfigError(
                "the vocabulary has no such special token",
                where=f"sampling.sampler.{key}",
                found=", ".join(missing),
                expected="names of special tokens of the model's tokenizer.json",
            )
        return [token_id for name in names if (token_id := found[name]) is not None]

    def _generation(self, drawn: ByteGeneration) -> Generation:
        indices = self.segmentation.encode(drawn.text)
        ends = accumulate(len(self.segmentation.vocabulary.strings[index]) for index in indices)
        tokens = self.segmentation.vocabulary.ids_S[indices].tolist()
        revealed_at = [drawn.drawn_at[end - 1] for end in ends]
        if drawn.stopped:
            tokens.append(self.stop_ids[0])
            revealed_at.append(drawn.num_forwards)
        return Generation(
            tokens=tokens, num_forwards=drawn.num_forwards, revealed_at=revealed_at, stopped=drawn.stopped
        )


@SAMPLERS.register
class ByteLevelConfig(SamplerConfig):
    """One byte a forward from the exact next-byte law of a token model; prompts may end inside a word."""

    name: Literal["byte_level"] = "byte_level"
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the most likely byte; otherwise the law of the next byte goes to the power 1 / temperature."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw among the most likely bytes that hold this much probability; null for all."""
    mode: Literal["exact", "fast"] = "exact"
    """exact: mass on tokens that the encoder cannot produce is taken out and the rest renormalised. fast: only tokens that
    agree with the byte drawn are tested; far fewer questions to the encoder, the same law for a model without such mass."""
    infill_before_suffix: tuple[str, ...] = ()
    """Special tokens before the suffix when a gap is filled, e.g. Qwen's <|fim_prefix|>, <|fim_suffix|>."""
    infill_before_prefix: tuple[str, ...] = ()
    """Special tokens between suffix and prefix, e.g. Qwen's <|fim_middle|>."""

    def build(self, trained: Trained) -> ByteLevel:
        """The sampler.

        Raises:
            ConfigError: the model does not predict next tokens, or the caller gave no tokenizer.
        """
        trained.require_objective(CAUSAL_OBJECTIVES, sampler=self.name)
        return ByteLevel(
            self,
            segmentation=Segmentation(trained.require_tokenizer(user=self.name)),
            ids=trained.ids,
            stop_ids=trained.stop_ids,
            seed=trained.seed,
        )
