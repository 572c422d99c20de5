"""Damage and malice, drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

# Names that would leave their folder. "ESCAPE" is a name nothing else has, so that a file of that name gives a write away.
ESCAPES = ("../../ESCAPE", "/tmp/ESCAPE", "..\\ESCAPE", "a/../../ESCAPE", "ESCAPE\x00.json", "~/ESCAPE", "C:ESCAPE")
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "x", "null", "[]",
    "\x00", "\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "é" * 300, "9" * 400, "1e999", [], {},
    [[]], {"name": "x"}, {"name": {}}, [None], list(range(50)), {"a": {"a": {"a": {}}}}, *ESCAPES,
)  # fmt: skip
SNIPPETS = (
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b":", b"- ", b"\t", b"\n", b"'", b'"', b"#", b"&a ", b"*a",
    b"<<: *a", b"!!python/object/apply:os.system ['touch ESCAPE']", b"!!python/name:os.system", b"!!binary aGk=", b"!!set {x}",
    b"${oc.env:HOME}", b"${a}", b"${", b"${oc.decode:x}", b"%YAML 9.9\n", b"---\n", b"? ", b"| \n", b"2001-01-01", b"0x1F",
    b".nan", b"-.inf", b"[" * 3000, b"{a: " * 500, b"9" * 5000,
)  # fmt: skip


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three of: bits flipped, bytes removed, repeated or swapped, a snippet put in, the end cut off."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(_BYTE_CHANGES)(data, rng)
    return data


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """One to three of: a value replaced, removed, repeated, or a key renamed, added or moved."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return tree
        rng.choice(_TREE_CHANGES)(rng.choice(places), rng)
    return tree


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.choice((1, 4, 32, 256, 4096)))


def _remove(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + data[stop:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:stop] + data[start:stop] * rng.randint(1, 5) + data[stop:]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + rng.randbytes(stop - start) + data[stop:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + rng.choice(SNIPPETS) + data[at:]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randint(0, len(data))]


def _swap_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    rng.shuffle(lines[rng.randrange(len(lines)) :])
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


_BYTE_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _remove, _repeat, _overwrite, _insert, _insert, _truncate, _swap_lines,
)  # fmt: skip

Place = tuple[Any, Any]


def _places(tree: Any) -> Any:
    """Every (container, key or index) of a tree."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield tree, key
            yield from _places(value)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield tree, index
            yield from _places(value)


def _replace(place: Place, rng: random.Random) -> None:
    container, key = place
    container[key] = json.loads(json.dumps(rng.choice(VALUES)))


def _nudge(place: Place, rng: random.Random) -> None:
    """A number becomes another number, a string a part of itself: nearly right is harder to refuse than absurd."""
    container, key = place
    value = container[key]
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        _replace(place, rng)
    elif isinstance(value, int | float):
        container[key] = rng.choice((value + 1, value - 1, -value, value * 1000, value / 3, str(value)))
    else:
        container[key] = rng.choice((value[1:], value + "x", value.upper(), value * 50, [value]))


def _delete(place: Place, rng: random.Random) -> None:
    container, key = place
    del container[key]


def _rename(place: Place, rng: random.Random) -> None:
    container, key = place
    if isinstance(container, dict):
        container[rng.choice((f"{key}x", "", "name", "a.b", *ESCAPES))] = container.pop(key)
    else:
        container.append(container[key])


def _add(place: Place, rng: random.Random) -> None:
    container, key = place
    value = json.loads(json.dumps(rng.choice(VALUES)))
    if isinstance(container, dict):
        container[rng.choice(("unknown", "path", "__class__", "0", f"{key}.x"))] = value
    else:
        container.insert(key, value)


_TREE_CHANGES: tuple[Callable[[Place, random.Random], None], ...] = (
    _replace,
    _replace,
    _nudge,
    _nudge,
    _delete,
    _rename,
    _add,
)
