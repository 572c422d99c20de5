"""The base of every configuration class, and choices by ``name:``."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Collection
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, SerializeAsAny, ValidationError
from pydantic_core import CoreSchema

from raydist.core.errors import ConfigError


class StrictModel(BaseModel):
    """Frozen, keyword-only, unknown keys refused. A field's docstring is its description in the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


_Config = TypeVar("_Config", bound=StrictModel)
_MAX_FOUND_CHARS = 200


class Registry:
    """The implementations of one kind of thing, chosen in a recipe by ``name:``.

    Discovery is limited to one package: on the first look-up each of its modules is imported once, and the classes
    decorated with :meth:`register` are found. So a new objective is one new file and nothing else.

    Args:
        kind: what a user calls it, in the singular (``"objective"``).
        package: the package whose modules hold the implementations.
        key: where a recipe makes the choice, for messages.
    """

    def __init__(self, kind: str, *, package: str, key: str) -> None:
        self.kind = kind
        self.key = key
        self.package = package
        self._classes: dict[str, type[StrictModel]] = {}
        self._discovered = False

    def register(self, cls: type[_Config]) -> type[_Config]:
        """Class decorator; the class must have a ``name: Literal["..."] = "..."`` field."""
        name = cls.model_fields["name"].default
        other = self._classes.get(name)
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise TypeError(f"two {self.kind}s are called {name!r}: {other} and {cls}")
        self._classes[name] = cls
        return cls

    def classes(self) -> dict[str, type[StrictModel]]:
        """Name to configuration class, sorted by name."""
        if not self._discovered:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._discovered = True
        return dict(sorted(self._classes.items()))

    def describe(self) -> dict[str, str]:
        """Name to the first sentence of the class's docstring, for ``raydist list``."""
        return {
            name: (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
            for name, cls in self.classes().items()
        }

    def parse(self, value: Any, *, key: str | None = None) -> Any:
        """Turns ``{"name": ..., fields...}`` into the chosen configuration object.

        Args:
            value: the mapping, the name alone, or an object that is returned as it is.
            key: where the choice is made, for messages; by default the registry's key.

        Raises:
            ConfigError: no name, a name nobody has, or a field that does not fit.
        """
        key = self.key if key is None else key
        if isinstance(value, StrictModel):
            return value
        if isinstance(value, str):
            value = {"name": value}
        classes = self.classes()
        if not isinstance(value, dict) or "name" not in value:
            raise ConfigError(
                f"the {self.kind} has no name", where=_joined(key, "name"), expected=f"one of {', '.join(classes)}"
            )
        name = value["name"]
        if not isinstance(name, str) or name not in classes:
            raise ConfigError(
                f"no {self.kind} has this name",
                where=_joined(key, "name"),
                found=str(name)[:_MAX_FOUND_CHARS],
                expected=f"one of {', '.join(classes)}",
                fix=nearest_hint(str(name), classes),
            )
        return validated(classes[name], value, prefix=key)

    def parse_inside(self, value: Any) -> Any:
        """:meth:`parse` for a field of a model that pydantic validates, which alone knows the field's key."""
        try:
            return self.parse(value, key="")
        except ConfigError as error:
            raise _InnerError(error) from None


class _InnerError(ValueError):
    """A choice inside a model failed; the key of the error is relative to the field."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error))
        self.error = error


def _joined(*keys: str) -> str:
    return ".".join(key for key in keys if key)


def validated(cls: type[_Config], value: Any, *, prefix: str = "") -> _Config:
    """``cls.model_validate`` whose failures are one :class:`ConfigError` naming the key.

    Raises:
        ConfigError: with the full key, what was found, what was expected and the nearest valid key.
    """
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise _explain(cls, error, prefix) from None


def _explain(cls: type[BaseModel], error: ValidationError, prefix: str) -> ConfigError:
    problems = error.errors(include_url=False)
    # A misspelt key leaves the right one missing: the misspelling is what helps.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    path = [str(part) for part in first["loc"]]
    key = _joined(prefix, *path)
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        owner = _owner(cls, path[:-1])
        return unknown_key(path[-1], owner.model_fields if owner else (), where=key, more=more)
    if first["type"] == "missing":
        return ConfigError("a required key is missing" + more, where=key, fix=f"set it: {key}=...")
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, _InnerError):
        return inner.error.moved_to(_joined(key, inner.error.where or ""))
    if first["type"] == "model_type" and isinstance(first["input"], StrictModel):
        name = getattr(first["input"], "name", type(first["input"]).__name__)
        return ConfigError("this choice does not fit here" + more, where=key or None, found=name, fix="choose another")
    message = first["msg"].removeprefix("Value error, ")
    found = None if isinstance(first["input"], dict | BaseModel) else repr(first["input"])[:_MAX_FOUND_CHARS]
    return ConfigError("a value does not fit" + more, where=key or None, found=found, expected=message)


def unknown_key(name: str, known: Collection[str], *, where: str, more: str = "") -> ConfigError:
    """The error of a key that is none of the known ones."""
    return ConfigError(
        "unknown key" + more,
        where=where,
        found=name,
        expected="one of " + ", ".join(known) if known else None,
        fix=nearest_hint(name, known) or "remove it",
    )


def _owner(cls: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The model class that a key path leads to, or None where it passes through a list or dict."""
    owner: Any = cls
    for part in path:
        field = owner.model_fields.get(part) if isinstance(owner, type) and issubclass(owner, BaseModel) else None
        if field is None:
            if part.isdigit():
                continue
            return None
        owner = _model_in(field.annotation)
        if owner is None:
            return None
    return owner


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        inner = _model_in(argument)
        if inner is not None:
            return inner
    return None


def nearest_hint(word: str, candidates: Any) -> str | None:
    """``did you mean X?`` for a misspelt word, or None."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else None


class _ChoiceSchema:
    """Marks a field as a choice, so that the JSON schema lists what the registry holds."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        classes = self.registry.classes().values()
        return {"anyOf": [handler(cls.__pydantic_core_schema__) for cls in classes]}


def choice(registry: Registry, base: type[StrictModel] = StrictModel) -> Any:
    """The annotation of a field whose class is chosen by ``name:``: ``objective: choice(OBJECTIVES)``."""
    return Annotated[base, SerializeAsAny(), BeforeValidator(registry.parse_inside), _ChoiceSchema(registry)]  # type: ignore[type-arg]
