"""A vocabulary as byte strings in lexicographic order, where a common prefix is a range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TextTokenizer(Protocol):
    """What decoding by bytes needs of a tokenizer; ``data_loaders.tokenizer.Tokenizer.byte_level()`` gives it.

    The encoder is ``encode(text) = merge(piece) for each piece of split(text)``, deterministic and lossless.
    """

    tokens: dict[int, bytes]
    """Id -> bytes of every token that stands for text; special tokens are not in it."""

    def split(self, text: str) -> list[bytes]:
        """The pieces that tokens never cross, in order; joined, they are the text in UTF-8."""

    def merge(self, piece: bytes) -> list[int]:
        """Ids of one piece; defined on any bytes."""

    def token_id(self, name: str) -> int | None:
        """The id of a special token by name, or None."""


@dataclass(frozen=True)
class TokenRange:
    """Tokens ``[low, high)`` of the sorted vocabulary, all of which agree on their first ``depth`` bytes."""

    low: int
    high: int
    depth: int


@dataclass(frozen=True, eq=False)
class ByteVocabulary:
    """Tokens that stand for text, sorted by their bytes; S of them.

    Sorted, the tokens that begin with given bytes are neighbours and those that equal them come first. So what remains
    possible after some bytes is a range, and a further byte is a binary search in it.

    Attributes:
        strings: the bytes of each token, ascending.
        ids_S: the id of each.
    """

    strings: list[bytes]
    ids_S: NDArray[np.int64]
    _flat: NDArray[np.uint8] = field(repr=False)
    _starts_S: NDArray[np.int64] = field(repr=False)
    lengths_S: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, tokens: Mapping[int, bytes]) -> ByteVocabulary:
        """From id -> bytes."""
        pairs = sorted((string, token_id) for token_id, string in tokens.items())
        strings = [string for string, _ in pairs]
        lengths_S = np.array([len(string) for string in strings], dtype=np.int64)
        return cls(
            strings=strings,
            ids_S=np.array([token_id for _, token_id in pairs], dtype=np.int64),
            _flat=np.frombuffer(b"".join(strings), dtype=np.uint8),
            _starts_S=np.cumsum(lengths_S) - lengths_S,
            lengths_S=lengths_S,
        )

    @property
    def all(self) -> TokenRange:
        """Every token, no byte fixed."""
        return TokenRange(0, len(self.strings), 0)

    def column(self, tokens: TokenRange) -> NDArray[np.uint8]:
        """The byte after the common ones of each token in a range; each must have one."""
        return self._flat[self._starts_S[tokens.low : tokens.high] + tokens.depth]

    def narrow(self, tokens: TokenRange, byte: int) -> tuple[range, TokenRange]:
        """The tokens of a range whose next byte is ``byte``: those that end with it, and those that go on."""
        column = self.column(tokens)
        low = tokens.low + int(np.searchsorted(column, byte, side="left"))
        high = tokens.low + int(np.searchsorted(column, byte, side="right"))
        depth = tokens.depth + 1
        middle = low + int(np.count_nonzero(self.lengths_S[low:high] == depth))
        return range(low, middle), TokenRange(middle, high, depth)
