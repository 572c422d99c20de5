"""Text that may end inside a character, and what may come next."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

_AFTER_DIGIT = ("", "a", "0", "00")
_AFTER_APOSTROPHE_LETTER = ("", "l", "e")  # 'll, 're, 've
_AFTER_SPACE = ("", "a", "0", ".", " ", "\n")
_NUM_CANDIDATES = 4096


def partial_decode(data: bytes) -> tuple[str, bytes] | None:
    """Whole characters and the bytes of an unfinished last one; None if no continuation makes it UTF-8."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if error.end != len(data) or error.reason != "unexpected end of data":
            return None
        return data[: error.start].decode(), data[error.start :]


def continuations(text: str, unfinished: bytes) -> tuple[str, ...]:
    """Short texts that may follow, enough of them that a pre-tokenizer shows every split it has for ``text``.

    An unfinished character is finished in each general category that it can have (letter, mark, number, ...). Behind a
    white space, a digit or an apostrophe's letter, where the patterns in use look ahead (``\\s+(?!\\S)``, groups of
    digits, ``'ll``), one of each kind that they tell apart follows. Elsewhere the splits up to the end of ``text`` do not
    depend on what follows.
    """
    if unfinished:
        return _completions(unfinished)
    if text and text[-1].isspace():
        return _AFTER_SPACE
    if text[-2:-1] == "'" and text[-1].isalpha():
        return _AFTER_APOSTROPHE_LETTER
    return _AFTER_DIGIT if text and text[-1].isnumeric() else ("",)


@lru_cache(maxsize=4096)
def _completions(unfinished: bytes) -> tuple[str, ...]:
    """One character that begins with these bytes for each general category among them."""
    low, high = _code_points(unfinished)
    found: dict[str, str] = {}
    for code in range(low, high, max(1, (high - low) // _NUM_CANDIDATES)):
        if 0xD800 <= code < 0xE000:
            continue
        character = chr(code)
        found.setdefault(unicodedata.category(character)[0], character)
    return tuple(found.values())


def _code_points(unfinished: bytes) -> tuple[int, int]:
    """The half-open range of code points whose UTF-8 begins with these bytes."""
    lead = unfinished[0]
    num_bytes, payload, lowest = (
        (2, lead & 0x1F, 0x80) if lead < 0xE0 else (3, lead & 0x0F, 0x800) if lead < 0xF0 else (4, lead & 0x07, 0x10000)
    )
    for byte in unfinished[1:]:
        payload = payload << 6 | byte & 0x3F
    shift = 6 * (num_bytes - len(unfinished))
    return max(lowest, payload << shift), min(0x110000, (payload + 1) << shift)
