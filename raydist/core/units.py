"""Numbers as people read and write them: counts, bytes and durations."""

from __future__ import annotations

import re

from raydist.core.errors import ConfigError

_BINARY = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$")


def format_count(value: float) -> str:
    """``1234567`` as ``1.23M``."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_bytes(num_bytes: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def format_duration(seconds: float) -> str:
    """``3725`` as ``1h02m``, ``75`` as ``1m15s``, ``0.42`` as ``0.42s``."""
    if seconds < 10:
        return f"{seconds:.2f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def parse_bytes(text: str | int, *, where: str = "size") -> int:
    """``"20GiB"``, ``"500MB"`` or a plain number of bytes, as bytes.

    Raises:
        ConfigError: the text is not a size.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.match(text)
    scale = {**_BINARY, **_DECIMAL}.get(match.group(2).upper()) if match else None
    if match is None or scale is None:
        raise ConfigError(
            "not a size", where=where, found=repr(text), expected="a number with B, MB, GB, MiB, GiB, ..."
        )
    return int(float(match.group(1)) * scale)
