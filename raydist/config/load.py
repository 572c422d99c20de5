"""From a recipe file and overrides to one resolved configuration.

Later wins: schema defaults <- ``base.yaml`` <- the recipe <- ``key.sub=value``. ``base.yaml`` is taken from the recipe's
folder, or from the nearest folder above it that has one. Where an overlay chooses another ``name`` for a choice
(objective, sampler, ...), the fields of the earlier choice are dropped with it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from raydist.config.base import validated
from raydist.config.registries import require_decoder
from raydist.config.schema import RunConfig
from raydist.config.yaml_limits import MAX_CHARS, require_parsable
from raydist.core.errors import ConfigError
from raydist.core.storage import is_remote, normalize, read_bytes

_BASE_NAME = "base.yaml"
_MAX_LEVELS_UP = 2
# The last four are what PyYAML's constructors let through: `0x_`, `!!int x`, `!!bool x`, `!!timestamp x`.
_UNREADABLE = (OmegaConfBaseException, YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError)
_PLAIN_WORD = re.compile(r"[A-Za-z_][\w./-]*")
_NOT_STRINGS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "none", "nan", "inf"})

# What may change between the attempts of one run: none of it reaches the weights beyond the order of a sum.
_NOT_IDENTITY = (
    "name",
    "output_dir",
    "tracking",
    "scaling",
    "checkpoint",
    "sampling",
    "data.cache_dir",
    "data.cache_limit",
    "data.prefetch_steps",
    "training.microbatch_rows",
    "training.log_every_steps",
    "training.num_threads",
    "training.peak_tflops",
    "model.attention",
    "model.recompute",
    "model.compile",
)


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        config: the validated configuration; ``config.name`` is always set.
        config_hash: identifies what the run computes; equal hashes may resume each other.
        path: the recipe file.
    """

    config: RunConfig
    config_hash: str
    path: str


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file with its overlays.

    Args:
        path: a YAML file.
        overrides: ``key.sub=value`` strings; values are YAML.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown or misspelt, a value does not fit, no such model
            can be.
    """
    if not os.path.isfile(path):
        raise ConfigError(
            "no such recipe",
            where=path,
            expected="a YAML file",
            fix="ls jobs/recipes shows the recipes that come along",
        )
    base = _find_base(path)
    layers = {file: read_yaml(file) for file in (base, path) if file is not None}
    given = parse_overrides(overrides)
    merged = functools.reduce(merge, (*layers.values(), given))
    try:
        recipe = resolve(merged, path=path)
        require_decoder(recipe.config.model)
        return recipe
    except ConfigError as error:
        where = error.where
        if where is None or _decides(given, where, merged):
            raise
        file = next((file for file in reversed(layers) if _decides(layers[file], where, merged)), path)
        raise error.moved_to(f"{where} in {file}") from None


def _decides(values: Any, key: str, merged: Any) -> bool:
    """Whether a layer is the one to blame for a dotted key, unless a later one is.

    It has the key, gives a value in short for a section above it, or put such a section in the place of earlier ones.
    """
    if not key or values is merged or not isinstance(values, dict | list):
        return True
    sections = merged if isinstance(merged, dict) else {}
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        rest = key.removeprefix(f"{name}.") if key != str(name) else ""
        if rest != key and _decides(value, rest, sections.get(name)):
            return True
    one_for_a_list = isinstance(values, dict) and key.split(".")[0] == "0"
    return one_for_a_list and _decides(values, key.partition(".")[2], merged)


def resolve(values: dict[str, Any], *, path: str) -> Recipe:
    """Validates merged values and computes what follows from them."""
    config = validated(RunConfig, values)
    config_hash = identity_hash(config)
    if config.name is None:
        stem = os.path.splitext(os.path.basename(path))[0]
        config = config.model_copy(update={"name": f"{stem}-{config_hash[:8]}"})
    return Recipe(config=config, config_hash=config_hash, path=path)


def read_resolved(path: str) -> Recipe:
    """Reads the ``config.yaml`` that a run directory keeps."""
    return resolve(read_yaml(path), path=path)


def dump_yaml(config: RunConfig) -> str:
    """The whole resolved configuration as YAML, readable by :func:`read_resolved`."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same configuration for processes that do not share this one's working directory."""
    values = config.model_dump(mode="json")
    values["output_dir"] = normalize(config.output_dir)
    for part in (*values["data"]["train"], *values["data"]["validation"]):
        part["path"] = normalize(part["path"])
    for section, key in (("data", "cache_dir"), ("model", "init_from")):
        if values[section][key] is not None:
            values[section][key] = normalize(values[section][key])
    return validated(RunConfig, values)


def identity_hash(config: RunConfig) -> str:
    """SHA-256 of the keys that decide what the run computes."""
    values = config.model_dump(mode="json")
    for key in _NOT_IDENTITY:
        *parents, leaf = key.split(".")
        node = values
        for part in parents:
            node = node[part]
        node.pop(leaf)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def changed_identity_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys on which two configurations differ and must not, for a resume."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    allowed = tuple(key + "." for key in _NOT_IDENTITY)
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [key for key in keys if not (key + ".").startswith(allowed)]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as ``{"a.b.0": leaf}``."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    flat: dict[str, Any] = {}
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, dict | list) and value:
            flat.update(flatten(value, name + "."))
        else:
            flat[name] = value
    return flat


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """``overlay`` over ``base``; dicts merge, everything else is replaced, a changed choice replaces the whole choice."""
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _chooses_anew(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _chooses_anew(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "name" in old and "name" in new and old["name"] != new["name"]


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["a.b=1", "c=[x,y]"]`` as nested values.

    Raises:
        ConfigError: an override has no ``=`` or an empty key, or its value is no YAML or calls a resolver.
    """
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key or not all(key.split(".")):
            raise ConfigError("not an override", found=repr(override), expected="key.sub=value")
        require_parsable(value, where=key)
    try:
        read = OmegaConf.from_dotlist(list(overrides))
        _require_no_resolvers(OmegaConf.to_container(read, resolve=False), where="override")
        values = OmegaConf.to_container(read, resolve=True)
    except _UNREADABLE as error:
        raise ConfigError(
            "an override cannot be read", found=_one_line(" ".join(overrides)), expected=_one_line(error)
        ) from None
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def as_overrides(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested values as ``key.sub=value`` words, which :func:`parse_overrides` turns back into them."""
    words: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            words += as_overrides(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={_as_word(value)}")
    return words


def _as_word(value: Any) -> str:
    if isinstance(value, str) and _PLAIN_WORD.fullmatch(value) and value.lower() not in _NOT_STRINGS:
        return value
    return json.dumps(value)


def _find_base(path: str) -> str | None:
    folder = os.path.dirname(os.path.abspath(path))
    for _ in range(_MAX_LEVELS_UP):
        candidate = os.path.join(folder, _BASE_NAME)
        if os.path.isfile(candidate) and os.path.abspath(path) != candidate:
            return candidate
        folder = os.path.dirname(folder)
    return None


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        text = read_bytes(path).decode() if is_remote(path) else _local_text(path)
        require_parsable(text, where=path)
        loaded = OmegaConf.load(io.StringIO(text))
        _require_no_resolvers(OmegaConf.to_container(loaded, resolve=False), where=path)
        values = OmegaConf.to_container(loaded, resolve=True)
    except (*_UNREADABLE, OSError) as error:
        raise ConfigError("cannot be read as YAML", where=path, found=_one_line(error)) from None
    if not isinstance(values, dict):
        raise ConfigError("the file is no mapping of keys", where=path, found=type(values).__name__)
    return {str(key): value for key, value in values.items()}


def _local_text(path: str) -> str:
    with open(path, encoding="utf-8") as stream:
        return stream.read(MAX_CHARS + 1)


def _require_no_resolvers(values: Any, *, where: str) -> None:
    """``${key.sub}`` refers to another key; ``${oc.env:NAME}`` would put a variable, and be it a password, into every record.

    Raises:
        ConfigError: a value calls a resolver.
    """
    if not isinstance(values, dict | list):
        return
    for key, value in flatten(values).items():
        if isinstance(value, str) and ":" in value.partition("${")[2]:
            raise ConfigError(
                "a file of settings reads nothing from its surroundings",
                where=f"{where}: {key}",
                found=value,
                expected="a value, or ${key.sub} for that of another key",
                fix=f'give it on the command line: {key}="$NAME"',
            )


def _one_line(words: object) -> str:
    return " ".join(str(words).replace('in "<file>", ', "").split())[:300]
