"""What a YAML text may be before a parser sees it: libyaml's own recursion ends the process on a text nested too deeply."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from raydist.core.errors import ConfigError

MAX_CHARS = 1 << 20
MAX_DEPTH = 100
_MAX_NODES = 50_000
_MERGE_TAG = "tag:yaml.org,2002:merge"
# Indentation, and the dashes of lists inside lists on one line.
_LINE_START = re.compile(r"^(?: |- |\? )+", re.MULTILINE)


def require_parsable(text: str, *, where: str) -> None:
    """Refuses a text that is too long or too deep, in the time of a scan.

    Raises:
        ConfigError: more than 1 Mi characters or 100 levels.
    """
    if len(text) > MAX_CHARS:
        raise ConfigError(
            "the file is too long for settings", where=where, found=f"{len(text)} characters", expected=f"{MAX_CHARS}"
        )
    if _deepest_possible(text) > MAX_DEPTH and _is_deeper(text, MAX_DEPTH):
        raise ConfigError("the file is nested too deeply", where=where, expected=f"at most {MAX_DEPTH} levels")


def read_documents(path: str) -> list[Any]:
    """The YAML documents of a cluster file, no two places of which are one object.

    Raises:
        ConfigError: it cannot be read, gives a key twice, or is too long, too deep, or explodes by anchors inside anchors.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            return parse_documents(stream.read(MAX_CHARS + 1), where=path)
    except (OSError, yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            "the cluster file cannot be read", where=path, found=" ".join(str(error).split())[:300]
        ) from None


def parse_documents(text: str, *, where: str) -> list[Any]:
    """The YAML documents of a text, as :func:`read_documents` gives those of a file.

    Raises:
        ConfigError: it is too long or too deep, or explodes by anchors inside anchors.
        yaml.YAMLError: it is no YAML, or gives a key twice; PyYAML's constructors raise other errors for odd scalars.
    """
    require_parsable(text, where=where)
    loader = _Loader(text)
    documents = []
    left = [_MAX_NODES]
    try:
        while loader.check_data():
            documents.append(_unshared(loader.get_data(), left=left, where=where))
    finally:
        loader.dispose()
    return documents


class _Loader(yaml.SafeLoader):
    """Refuses keys given twice, and merge keys (``<<``) that copy too many entries, before it copies them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._left = _MAX_NODES

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if (key.tag, key.value) in seen:
                    raise ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            if key.tag != _MERGE_TAG:
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(source, yaml.MappingNode):
                    self.flatten_mapping(source)
                    self._left -= len(source.value)
                    if self._left < 0:
                        raise ConstructorError(None, None, f"<< copies more than {_MAX_NODES} keys", key.start_mark)
        super().flatten_mapping(node)


def _unshared(node: Any, *, left: list[int], where: str) -> Any:
    """A copy in which an anchor's places are apart: an edit of one pod shall not reach the other."""
    left[0] -= 1
    if left[0] < 0:
        raise ConfigError("the file is too large", where=where, expected=f"at most {_MAX_NODES} values")
    if isinstance(node, dict):
        return {key: _unshared(value, left=left, where=where) for key, value in node.items()}
    if isinstance(node, list):
        return [_unshared(value, left=left, where=where) for value in node]
    return node


def _deepest_possible(text: str) -> int:
    """A bound on the nesting, brackets in strings counted in."""
    indents = max((len(match.group()) for match in _LINE_START.finditer(text)), default=0)
    return text.count("[") + text.count("{") + indents + 1


def _is_deeper(text: str, limit: int) -> bool:
    """Whether the text, as far as it is YAML, has more levels; the parser's events need no recursion."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > limit:
                    return True
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except (yaml.YAMLError, ValueError):
        pass  # the reader says what is wrong with it
    return False
