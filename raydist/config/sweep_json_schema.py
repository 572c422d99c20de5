"""The JSON schema that editors complete and check sweep files with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raydist.config.schema import RunConfig
from raydist.config.sweep_schema import OWN_BY_TRIAL, SweepConfig
from raydist.config.sweep_values import KINDS

_WHEN = "A trial has the key only if these keys of its recipe have these values, or one of them where a list is given."
_LIST = "Every value is tried, or drawn with the same probability."


def sweep_json_schema() -> dict[str, Any]:
    """The schema of a sweep file as people write it: short forms, overlays, and the recipe's keys with their descriptions.

    Keys are offered, not enforced: a choice may have fields that another one lacks, and what does not fit is said when
    the sweep is loaded.
    """
    schema = SweepConfig.model_json_schema()
    keys = dict(_dotted_keys(RunConfig.model_json_schema()))
    schema["$defs"] |= {
        "Distribution": _distribution(schema["$defs"]),
        "Space": _section(keys, {"$ref": "#/$defs/Distribution"}, without=OWN_BY_TRIAL),
        "Overrides": _section(keys, {}, without=("name",)),
    }
    for kind in KINDS.values():
        schema["$defs"].pop(kind.__name__, None)
    properties = schema["properties"]
    for section in ("space", "overrides"):
        reference = f"#/$defs/{section.capitalize()}"
        properties[section] = {"$ref": reference, "description": properties[section]["description"]}
    metrics = properties["metric"]
    short = [{"type": "string"}, metrics["items"]]
    properties["metric"] = {
        "anyOf": [*short, {"type": "array", "items": {"anyOf": short}, "minItems": 1}],
        "description": metrics["description"],
    }
    overlay = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    properties["overlays"] = {
        "type": "object",
        "additionalProperties": overlay,
        "description": "Name -> what `+name` on the command line changes; null takes a key out of the space.",
    }
    return schema


def _distribution(definitions: dict[str, Any]) -> dict[str, Any]:
    """A list, one of the distributions, or null, with which an overlay removes a key."""
    when = {"type": "object", "description": _WHEN}
    forms: list[dict[str, Any]] = [{"type": "array", "minItems": 1, "description": _LIST}]
    for word, kind in {**KINDS, "grid": KINDS["choice"]}.items():
        (field,) = (name for name in kind.model_fields if name != "when")
        shape = kind.model_json_schema()["properties"][field]
        about = {"description": (kind.__doc__ or "").strip()}
        forms.append(
            {
                "type": "object",
                "properties": {word: {**shape, **about}, "when": when},
                "required": [word],
                "additionalProperties": False,
            }
        )
    return {"anyOf": [*forms, {"type": "null"}]}


def _section(keys: dict[str, str], value: dict[str, Any], *, without: tuple[str, ...]) -> dict[str, Any]:
    """A mapping from dotted keys of the recipe."""
    offered = {
        key: {**value, **({"description": text} if text else {})}
        for key, text in keys.items()
        if key.split(".")[0] not in without
    }
    return {"type": "object", "properties": offered, "additionalProperties": value}


def _dotted_keys(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every key of a recipe and its description; fields of all choices, under the key of the choice."""
    definitions, seen = schema["$defs"], set()

    def walk(node: dict[str, Any], prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        reference = node.get("$ref", "").rpartition("/")[2]
        if reference in above:
            return
        if reference:
            yield from walk(definitions[reference], prefix, (*above, reference))
        for variant in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            yield from walk(variant, prefix, above)
        for name, field in node.get("properties", {}).items():
            key = f"{prefix}{name}"
            if key not in seen:
                seen.add(key)
                yield key, field.get("description", "")
            yield from walk(field, f"{key}.", above)

    yield from walk(schema, "", ())
