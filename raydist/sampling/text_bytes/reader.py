"""Reading texts byte by byte with a token model: the one engine of sampling, likelihood and ensembles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from raydist.sampling.base import Trained
from raydist.sampling.prefill import check_prompts
from raydist.sampling.text_bytes.cached_law import CachedLaw
from raydist.sampling.text_bytes.covers import Covers, closed_covers
from raydist.sampling.text_bytes.segmentation import Segmentation, Tail
from raydist.sampling.text_bytes.utf8 import partial_decode


@dataclass(frozen=True)
class ByteModel:
    """A token model with what makes it a model of bytes.

    Attributes:
        model: a :class:`raydist.models.decoder.Decoder` in evaluation mode.
        segmentation: of the tokenizer it was trained with; share one among all uses of a tokenizer, it remembers.
        ids: special ids.
        stop_ids: tokens that end a text.
        exact: see :class:`raydist.sampling.text_bytes.covers.Covers`.
    """

    model: Any
    segmentation: Segmentation
    ids: TokenIds
    stop_ids: tuple[int, ...] = ()
    exact: bool = True

    @classmethod
    def of(cls, model: Any, *, trained: Trained, exact: bool = True) -> ByteModel:
        """A decoder with what is known of it beside its weights.

        Raises:
            ConfigError: its tokenizer is not known.
        """
        segmentation = Segmentation(trained.require_tokenizer(user="byte model"))
        return cls(model, segmentation, ids=trained.ids, stop_ids=trained.stop_ids, exact=exact)

    def start(self) -> list[int]:
        """The token that stands before a text: begin-of-text, else end-of-text, which parts the documents of packed rows.

        Raises:
            ConfigError: the vocabulary has neither.
        """
        token_id = self.ids.eos if self.ids.bos is None else self.ids.bos
        if token_id is None:
            raise ConfigError(
                "nothing stands before the first token, so it has no law",
                where="context",
                found="a vocabulary without begin-of-text and end-of-text tokens",
                expected="a token to begin with",
                fix="give a context, or a prompt of more than one word",
            )
        return [token_id]


class ByteReader:
    """Several texts at once, each with all covers of what was read.

    Args:
        model: the model.
        texts: what has been read already, as bytes; may end inside a word or a character.
        contexts: token ids before each text that are taken as they are (begin-of-text, a suffix for infilling). Where a
            context is empty, :meth:`ByteModel.start` is put there if the text has only one word.
        max_new_bytes: bytes that may be read further.

    Raises:
        ConfigError: a text that is no UTF-8, or one too long for the model's positions.
    """

    @torch.inference_mode()
    def __init__(
        self, model: ByteModel, texts: Sequence[bytes], *, contexts: Sequence[Sequence[int]], max_new_bytes: int
    ) -> None:
        starts = [Start.of(model, text, context=context) for text, context in zip(texts, contexts, strict=True)]
        pending = max(len(start.rest) for start in starts)
        check_prompts(
            [start.base for start in starts],
            max_new_tokens=pending + max_new_bytes,
            max_positions=model.model.config.max_positions,
        )
        self.vocabulary = model.segmentation.vocabulary
        self._law = CachedLaw(
            model.model,
            [start.base for start in starts],
            ids_S=self.vocabulary.ids_S,
            stop_ids=model.stop_ids,
            num_new=pending + max_new_bytes,
            num_pending=pending,
        )
        self._covers = [
            Covers(model.segmentation, tail=model.segmentation.tail_of(start.forced), exact=model.exact)
            for start in starts
        ]
        self._log_masses: list[float] = []
        self._read([start.rest for start in starts])

    @property
    def num_forwards_B(self) -> list[int]:
        """Model forwards that each row took part in, the one over its beginning included."""
        return list(self._law.num_forwards_B)

    def log_masses(self) -> list[float]:
        """``log P`` of the text of each row beyond its last settled boundary at the start, nats."""
        return list(self._log_masses)

    def next_symbols(self) -> NDArray[np.float64]:
        """The law of what comes next, float64 ``[B, 257]``: the bytes, then the end of the text."""
        return np.stack([covers.next_symbols() for covers in self._covers])

    def can_read(self, bytes_B: Sequence[int]) -> list[bool]:
        """Whether each row can go on with a byte; always true where an exact law gives it mass."""
        return [covers.can_advance(byte) for covers, byte in zip(self._covers, bytes_B, strict=True)]

    @torch.inference_mode()
    def advance(self, bytes_B: Sequence[int]) -> None:
        """Reads one byte a row; one forward."""
        for covers, byte in zip(self._covers, bytes_B, strict=True):
            covers.advance(byte)
        self._log_masses = [covers.log_mass() for covers in self._covers]
        asked_B = [[self._ids(cover.tokens) for cover in covers.closed] for covers in self._covers]
        laws_B = self._law.after(asked_B, num_forced_B=[covers.num_forced() for covers in self._covers])
        for covers, laws in zip(self._covers, laws_B, strict=True):
            covers.grow(laws)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forgets all other rows."""
        self._law.keep_rows(rows)
        self._covers = [self._covers[row] for row in rows]
        self._log_masses = [self._log_masses[row] for row in rows]

    def _read(self, texts: Sequence[bytes]) -> None:
        """Reads the unsettled ends of all rows in one forward: it is known beforehand which covers will close."""
        pairs = list(zip(self._covers, texts, strict=True))
        sequences_B = [
            closed_covers(covers.segmentation, tail=covers.closed[0].tail, text=text) for covers, text in pairs
        ]
        asked_B = [[self._ids(tokens) for tokens in sequences] for sequences in sequences_B]
        answers_B = self._law.after(asked_B, num_forced_B=[0] * len(pairs))
        for (covers, text), sequences, answers in zip(pairs, sequences_B, answers_B, strict=True):
            laws = dict(zip(sequences, answers, strict=True))
            for byte in text:
                covers.grow([laws[cover.tokens] for cover in covers.closed])
                covers.advance(byte)
            self._log_masses.append(covers.log_mass())
            covers.grow([laws[cover.tokens] for cover in covers.closed])

    def _ids(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.vocabulary.ids_S[list(tokens)].tolist())


@dataclass(frozen=True)
class Start:
    """Where the reading of a text begins.

    Attributes:
        base: token ids that the model sees before the first byte that is read.
        forced: the last of them, as vocabulary indices: tokens of the text before its last settled boundary.
        rest: the bytes of the text behind that boundary.
    """

    base: list[int]
    forced: tuple[int, ...]
    rest: bytes

    @classmethod
    def of(cls, model: ByteModel, text: bytes, *, context: Sequence[int]) -> Start:
        """Cuts a text at its last settled boundary.

        Raises:
            ConfigError: the text is no UTF-8, or nothing stands before its first token.
        """
        segmentation = model.segmentation
        if partial_decode(text) is None:
            raise ConfigError("the text is no UTF-8", where="text", found=text[:100], expected="bytes of UTF-8")
        tokens = tuple(segmentation.encode(text))
        forced = tokens[: segmentation.stable_boundary(Tail(tokens, text))]
        ids = segmentation.vocabulary.ids_S[list(forced)].tolist()
        num_bytes = sum(len(segmentation.vocabulary.strings[token]) for token in forced)
        return cls(base=[*context, *ids] or model.start(), forced=forced, rest=text[num_bytes:])
