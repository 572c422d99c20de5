"""Byte-level BPE taken apart: the bytes of a token, the split into pieces, the merges inside a piece.

A tokenizer of this kind spells each byte as one printable character (GPT-2's alphabet), cuts the text into pieces by a
pattern and merges inside each piece, so ``encode(text) = merge(piece 1) + merge(piece 2) + ...``. Decoding by bytes asks
for the three steps apart, because ``merge`` is defined on any bytes, a half character included, and ``encode`` is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raydist.core.errors import TokenizerError


class ByteLevelBpe:
    """The steps of a byte-level BPE tokenizer.

    A Unicode normalisation (NFC in Qwen's files) is left out: text is taken as it is.

    Args:
        content: a ``tokenizer.json``.

    Raises:
        TokenizerError: its tokens are not byte strings.
    """

    def __init__(self, content: bytes) -> None:
        from tokenizers import Tokenizer as HfTokenizer

        inner = HfTokenizer.from_str(content.decode())
        _check(json.loads(inner.to_str()))
        self._model = inner.model
        self._pre_tokenizer = inner.pre_tokenizer
        self._characters = byte_characters()
        self._bytes = {character: byte for byte, character in enumerate(self._characters)}
        self._added = {token.content: token_id for token_id, token in inner.get_added_tokens_decoder().items()}
        self.tokens = self._byte_strings(inner.get_vocab(with_added_tokens=False))
        """Id -> bytes, without added (special) tokens."""

    def split(self, text: str) -> list[bytes]:
        """The pieces that are never merged across; joined, they are the text in UTF-8."""
        return [self._unspell(piece) for piece, _ in self._pre_tokenizer.pre_tokenize_str(text)]

    def merge(self, piece: bytes) -> list[int]:
        """Ids of one piece, by the merges alone."""
        spelled = "".join(self._characters[byte] for byte in piece)
        return [token.id for token in self._model.tokenize(spelled)]

    def token_id(self, name: str) -> int | None:
        """The id of an added (special) token, or None."""
        return self._added.get(name)

    def _byte_strings(self, vocabulary: Mapping[str, int]) -> dict[int, bytes]:
        added = set(self._added.values())
        text = {spelled: token_id for spelled, token_id in vocabulary.items() if token_id not in added}
        foreign = next((spelled for spelled in text if not self._bytes.keys() >= set(spelled)), None)
        if foreign is not None:
            raise _not_byte_level(f"the token {foreign!r}")
        return {token_id: self._unspell(spelled) for spelled, token_id in text.items() if spelled}

    def _unspell(self, spelled: str) -> bytes:
        return bytes(map(self._bytes.__getitem__, spelled))


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself where it is visible Latin-1, else the next from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _check(parsed: Mapping[str, Any]) -> None:
    model, normalizer, splitter = parsed["model"], parsed["normalizer"], parsed["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise _not_byte_level(f"a {model['type']} model" + (" with dropout" if model.get("dropout") else ""))
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _not_byte_level(f"the normaliser {normalizer['type']}")
    steps = [] if splitter is None else splitter.get("pretokenizers", [splitter])
    last = steps[-1] if steps else {"type": "none"}
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _not_byte_level("a pre-tokenizer that does not end in plain ByteLevel")


def _not_byte_level(found: str) -> TokenizerError:
    return TokenizerError(
        "decoding by bytes cannot use this tokenizer",
        where="tokenizer.json",
        found=found,
        expected="deterministic byte-level BPE without added prefix space, as Llama 3, Qwen, GPT-2 and raydist's own have",
    )
