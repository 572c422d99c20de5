"""An exported model as a function from prompts to texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_loaders.tokenizer import Tokenizer
from raydist.config.load import parse_overrides
from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.models.hf import load_decoder
from raydist.sampling.base import SamplerConfig, Trained

if TYPE_CHECKING:
    from raydist.models.decoder import Decoder

DEFAULT_NEW_TOKENS = 128
_PLAIN = {"name": "autoregressive"}


class TextModel:
    """A decoder with its tokenizer and the settings that its recipe samples with.

    Args:
        decoder: in evaluation mode.
        tokenizer: of the model.
        meta: contents of ``raydist.json`` (:func:`raydist.models.hf.read_meta`).
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, meta: Mapping[str, Any]) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._meta = meta

    @classmethod
    def load(cls, folder: str) -> TextModel:
        """Reads an exported folder, onto a GPU where there is one.

        Raises:
            ModelError: the folder cannot be read as a decoder.
            TokenizerError: it has no tokenizer.
        """
        import torch

        decoder, meta = load_decoder(folder, device="cuda" if torch.cuda.is_available() else "cpu")
        return cls(decoder, Tokenizer.load(folder), meta)

    def generate(
        self, prompts: Sequence[str], *, sampler: str = "", max_new_tokens: int | None = None, seed: int = 0
    ) -> list[str]:
        """The continuation of each prompt, without the prompt.

        Args:
            prompts: not empty.
            sampler: see :func:`choose_sampler`.
            max_new_tokens: an upper limit per prompt; None for the recipe's.
            seed: of the sampling noise.

        Raises:
            ConfigError: an empty prompt, no room for new tokens, or a sampler that does not fit the model.
        """
        if max_new_tokens is None:
            max_new_tokens = default_new_tokens(self._meta)
        if max_new_tokens < 1:
            raise ConfigError("nothing to generate", where="max_new_tokens", found=max_new_tokens, expected="from 1 on")
        tokens = [self._tokenizer.encode(prompt) for prompt in prompts]
        if not all(tokens):
            raise ConfigError("an empty prompt", where="prompt", found=repr(prompts[tokens.index([])]))
        trained = Trained.from_meta(
            self._meta, vocab_size=self._tokenizer.vocab_size, seed=seed, tokenizer=self._tokenizer.byte_level
        )
        chosen = choose_sampler(sampler, self._meta).build(trained)
        generations = chosen.generate(self._decoder, tokens, max_new_tokens=max_new_tokens)
        return [self._tokenizer.decode(generation.tokens) for generation in generations]


def choose_sampler(text: str, meta: Mapping[str, Any]) -> SamplerConfig:
    """A sampler in one string, so that it travels through servers that know only strings.

    ``""`` is the recipe's own; ``"set_block block_size=8"`` another one with its settings; ``"temperature=0"`` the
    recipe's with a setting changed; ``{"name": ...}`` is JSON.

    Raises:
        ConfigError: no such sampler or setting, or no JSON.
    """
    own = dict((meta.get("sampling") or {}).get("sampler") or _PLAIN)
    if text.lstrip().startswith("{"):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError("the sampler is no JSON", where="sampler", found=f"{text!r}: {error}") from None
    else:
        words = text.split()
        named = bool(words) and "=" not in words[0]
        values = {**({"name": words[0]} if named else own), **parse_overrides(words[1:] if named else words)}
    config: SamplerConfig = SAMPLERS.parse(values)
    return config


def default_new_tokens(meta: Mapping[str, Any]) -> int:
    """How many tokens the recipe's samples have at most."""
    return int((meta.get("sampling") or {}).get("max_new_tokens", DEFAULT_NEW_TOKENS))
