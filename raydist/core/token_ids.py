"""The special ids of a vocabulary, as data, objectives and samplers share them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenIds:
    """The vocabulary's size and its special ids; None where there is no such token."""

    vocab_size: int
    bos: int | None
    eos: int | None
    mask: int | None
    pad: int | None
