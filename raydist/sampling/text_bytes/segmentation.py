"""Which token sequences the encoder can produce.

A sequence t is *reachable* if ``encode(X)`` begins with t for some text X. The law of any text that was encoded puts all
its mass there. The usual test ``encode(decode(t)) == t`` is narrower: it drops ``["x", " ", " "]``, which begins the
encoding of ``"x  "`` followed by a letter without a merge with the space, and it says nothing about a sequence that ends
inside a character. Here t is reachable if some continuation s makes the real pre-tokenizer cut ``decode(t) + s`` into
pieces that, cut off at the end of ``decode(t)``, are merged into t by the real merges. (BPE merges of a piece's beginning
do not depend on the rest of the piece once a token boundary lies between them.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from raydist.core.errors import ConfigError
from raydist.sampling.text_bytes.utf8 import continuations, partial_decode
from raydist.sampling.text_bytes.vocabulary import ByteVocabulary, TextTokenizer

_CACHED_TAILS = 4096
_CACHED_PIECES = 65_536
_FAR_BYTES = 128


@dataclass(frozen=True)
class Tail:
    """The end of a reachable sequence: as much as decides what may follow.

    Attributes:
        tokens: indices into the sorted vocabulary.
        text: their bytes.
    """

    tokens: tuple[int, ...] = ()
    text: bytes = b""


class Segmentation:
    """The encoder as a test of token sequences; answers are remembered.

    Args:
        tokenizer: the encoder of the model's training data.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = ByteVocabulary.of(tokenizer.tokens)
        self._index = {token_id: index for index, token_id in enumerate(self.vocabulary.ids_S.tolist())}
        self._merge = lru_cache(maxsize=_CACHED_PIECES)(self._merged)
        self._followers = lru_cache(maxsize=_CACHED_TAILS)(self._packed_followers)

    def encode(self, data: bytes) -> list[int]:
        """Vocabulary indices of a text that may begin and end inside a character.

        Raises:
            ConfigError: it cannot be a part of a UTF-8 text.
        """
        start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), min(4, len(data)))
        decoded = partial_decode(data[start:])
        if decoded is None or start == 4:
            raise ConfigError("not a part of a UTF-8 text", where="text", found=data[:100], expected="bytes of UTF-8")
        text, unfinished = decoded
        pieces = [data[:start], *self.tokenizer.split(text), unfinished]
        return [index for piece in pieces if piece for index in self._merge(piece)]

    def extend(self, tail: Tail, token: int) -> Tail:
        """The tail after one more token, cut at the last boundary that nothing to come can move."""
        longer = Tail((*tail.tokens, token), tail.text + self.vocabulary.strings[token])
        keep_from = self.stable_boundary(longer)
        return Tail(longer.tokens[keep_from:], self._text(longer.tokens[keep_from:]))

    def tail_of(self, tokens: Sequence[int]) -> Tail:
        """The tail of a whole sequence of vocabulary indices."""
        whole = Tail(tuple(tokens), self._text(tokens))
        keep_from = self.stable_boundary(whole)
        return Tail(whole.tokens[keep_from:], self._text(whole.tokens[keep_from:]))

    def can_follow(self, tail: Tail, tokens: Iterable[int]) -> NDArray[np.bool_]:
        """Whether the sequence stays reachable with each of these tokens as the next one."""
        return np.fromiter((self._reachable(tail, token) for token in tokens), dtype=np.bool_)

    def followers(self, tail: Tail) -> NDArray[np.bool_]:
        """:meth:`can_follow` of the whole vocabulary, bool ``[S]``.

        Asks the encoder about every token, which takes the time of some S short encodings; kept for the next time the
        same tail occurs.
        """
        num_tokens = len(self.vocabulary.strings)
        return np.unpackbits(self._followers(tail), count=num_tokens).astype(np.bool_)

    def is_whole(self, tail: Tail) -> bool:
        """Whether the text may end here: the tail is the encoding of its own text."""
        decoded = partial_decode(tail.text)
        return decoded is not None and not decoded[1] and self._fits(tail.tokens, decoded[0], len(tail.text))

    def stable_boundary(self, tail: Tail) -> int:
        """How many tokens of a tail lie before the last boundary that no continuation can move.

        That is the boundary of a piece which white space follows and does not precede; the patterns in use look ahead no
        further. In a text without such places it is a token boundary between characters 128 bytes back, beyond which no
        pattern in use looks and which no merge with a coming token reaches.
        """
        token_ends = list(accumulate(len(self.vocabulary.strings[token]) for token in tail.tokens))
        far = [end for end in token_ends if len(tail.text) - end >= _FAR_BYTES and tail.text[end] & 0xC0 != 0x80]
        decoded = partial_decode(tail.text[far[-1] :] if far else tail.text)
        text, start = ("" if decoded is None else decoded[0]), (far[-1] if far else 0)
        known = {end: count + 1 for count, end in enumerate(token_ends)}
        boundary, stable = start, start
        for piece, after in pairwise(self.tokenizer.split(text) if text else []):
            boundary += len(piece)
            if boundary in known and after.decode()[0].isspace() and not piece.decode()[-1].isspace():
                stable = boundary
        return known.get(stable, 0)

    def _text(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self.vocabulary.strings[token] for token in tokens)

    def _merged(self, piece: bytes) -> tuple[int, ...]:
        return tuple(self._index[token_id] for token_id in self.tokenizer.merge(piece))

    def _packed_followers(self, tail: Tail) -> NDArray[np.uint8]:
        tokens = range(len(self.vocabulary.strings))
        if not self._ends_before_space(tail):
            return np.packbits(self.can_follow(tail, tokens))
        alone, longer = self.vocabulary.narrow(self.vocabulary.all, ord(" "))
        spaced = slice(alone.start, longer.high)
        allowed = np.concatenate(
            [
                self.can_follow(tail, tokens[: spaced.start]),
                self.followers(Tail())[spaced] & self._fits(tail.tokens, tail.text.decode() + " a", len(tail.text)),
                self.can_follow(tail, tokens[spaced.stop :]),
            ]
        )
        return np.packbits(allowed)

    def _ends_before_space(self, tail: Tail) -> bool:
        """Whether a space behind the tail begins a piece: then what a token with a space may do there is known already."""
        decoded = partial_decode(tail.text)
        if decoded is None or decoded[1] or not decoded[0] or decoded[0][-1].isspace():
            return False
        return len(tail.text) in accumulate(map(len, self.tokenizer.split(decoded[0] + " a")))

    def _reachable(self, tail: Tail, token: int) -> bool:
        data = tail.text + self.vocabulary.strings[token]
        decoded = partial_decode(data)
        if decoded is None:
            return False
        tokens = (*tail.tokens, token)
        return any(self._fits(tokens, decoded[0] + more, len(data)) for more in continuations(*decoded))

    def _fits(self, tokens: tuple[int, ...], text: str, length: int) -> bool:
        """Whether the pieces of ``text``, cut off after ``length`` bytes, are merged into these tokens."""
        first = start = 0
        for piece in self.tokenizer.split(text):
            merged = self._merge(piece[: length - start])
            if tokens[first : first + len(merged)] != merged:
                return False
            first, start = first + len(merged), start + len(piece)
            if start >= length:
                return first == len(tokens)
        return first == len(tokens)
