"""Several models of one text whose vocabularies differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raydist.core.errors import ConfigError
from raydist.sampling.text_bytes.reader import ByteModel, ByteReader


class ByteEnsemble:
    """The arithmetic mean of the members' next-byte laws, ``P(b | x) = sum_m weight_m P_m(b | x)``.

    Speaks the interface of one :class:`raydist.sampling.text_bytes.reader.ByteReader`. The end of the text is one symbol,
    whatever token each member has for it. A member that cannot go on (its law is zero throughout) is left out of the mean.

    Args:
        members: the models.
        texts: what has been read already.
        contexts: token ids before each text, for each member; None for empty ones. Context ids belong to a vocabulary.
        max_new_bytes: bytes that may be read further.
        weights: of the members, positive; None for equal ones. They are divided by their sum.

    Raises:
        ConfigError: no members, or weights that do not fit.
    """

    def __init__(
        self,
        members: Sequence[ByteModel],
        texts: Sequence[bytes],
        *,
        max_new_bytes: int,
        contexts: Sequence[Sequence[Sequence[int]]] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        shares = [1.0] * len(members) if weights is None else list(weights)
        if not members or len(shares) != len(members) or min(shares) <= 0:
            raise ConfigError(
                "members and weights of an ensemble do not fit",
                where="ensemble",
                found=f"{len(members)} members, weights {shares}",
                expected="at least one member and one positive weight for each",
            )
        contexts = [[[] for _ in texts] for _ in members] if contexts is None else contexts
        self._weights_M = np.array(shares) / sum(shares)
        self._readers = [
            ByteReader(member, texts, contexts=own, max_new_bytes=max_new_bytes)
            for member, own in zip(members, contexts, strict=True)
        ]

    @property
    def num_forwards_B(self) -> list[int]:
        """Forwards of each row, those of all members together."""
        return [sum(counts) for counts in zip(*(reader.num_forwards_B for reader in self._readers), strict=True)]

    def next_symbols(self) -> NDArray[np.float64]:
        """The mean law of what comes next, float64 ``[B, 257]``: the bytes, then the end of the text."""
        laws_MBN = np.stack([reader.next_symbols() for reader in self._readers])
        mean_BN = np.einsum("m,mbn->bn", self._weights_M, laws_MBN)
        totals_B1 = mean_BN.sum(axis=-1, keepdims=True)
        return np.divide(mean_BN, totals_B1, out=np.zeros_like(mean_BN), where=totals_B1 > 0)

    def can_read(self, bytes_B: Sequence[int]) -> list[bool]:
        """Whether some member can go on with each row's byte."""
        return [any(answers) for answers in zip(*(reader.can_read(bytes_B) for reader in self._readers), strict=True)]

    def advance(self, bytes_B: Sequence[int]) -> None:
        """Every member reads one byte a row."""
        for reader in self._readers:
            reader.advance(bytes_B)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forgets all other rows."""
        for reader in self._readers:
            reader.keep_rows(rows)
