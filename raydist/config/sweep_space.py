"""The space of a sweep: a distribution for each key of the recipe, and which keys a trial has."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydist.config.load import merge
from raydist.config.sweep_values import Choice, Distribution
from raydist.core.errors import ConfigError

_ABSENT = object()

Choose = Callable[[str, Distribution], Any]


@dataclass(frozen=True)
class Space:
    """The distributions in the order of the file, over the values of a recipe.

    A trial is a mapping from key to value; a key whose ``when`` does not hold is not in it. Conditions are about the recipe
    as the keys before have left it, so they may name any of its keys.

    Attributes:
        distributions: by dotted key.
        recipe: the values of the recipe that all trials start from, nested.
    """

    distributions: Mapping[str, Distribution]
    recipe: Mapping[str, Any]

    def trial(self, choose: Choose) -> dict[str, Any]:
        """One trial, asking ``choose`` for the value of each key that it has."""
        (trial,) = self._trials(lambda key, distribution: [choose(key, distribution)])
        return trial

    def random_trial(self, index: int, *, seed: int) -> dict[str, Any]:
        """A draw that depends on (seed, index, key) alone, so that neither order nor a restart changes a trial."""
        return self.trial(lambda key, distribution: distribution.at(random.Random(f"{seed}/{index}/{key}").random()))

    def grid(self) -> Iterator[dict[str, Any]]:
        """All trials of a space of lists; the last key varies fastest."""
        return self._trials(lambda _, distribution: distribution.corners)

    def covering(self) -> list[dict[str, Any]]:
        """Trials in which every corner of every key occurs, each with every value of the keys that its conditions read."""
        trials: dict[str, dict[str, Any]] = {}
        for key in self.distributions:
            for trial in self._corners_of(key):
                trials.setdefault(json.dumps(trial, sort_keys=True), trial)
        return list(trials.values())

    def check_conditions(self, *, where: str) -> None:
        """Refuses a part of a key before the whole, conditions on a later key or a range, and keys that no trial can have.

        Raises:
            ConfigError: with what the condition's key can be.
        """
        keys = list(self.distributions)
        for index, key in enumerate(keys):
            for whole in self._setters(key):
                if keys.index(whole) > index:
                    raise ConfigError(
                        "the whole would be chosen after its part, and replace it",
                        where=f"{where}.{key}",
                        fix=f"write {whole} above {key}",
                    )
            for condition in self.distributions[key].when:
                for setter in self._setters(condition):
                    if keys.index(setter) >= index:
                        raise ConfigError(
                            "a condition is about a key that is chosen later",
                            where=f"{where}.{key}.when",
                            found=condition,
                            fix=f"write {setter} above {key}",
                        )
                    if not isinstance(self.distributions[setter], Choice):
                        raise ConfigError(
                            "a condition is about a key without a list of values",
                            where=f"{where}.{key}.when",
                            found=condition,
                            fix=f"make {setter} a choice",
                        )
            if not any(self._corners_of(key)):
                self._refuse_impossible(key, where=where)

    def _refuse_impossible(self, key: str, *, where: str) -> None:
        """Says what the keys of the condition can be."""
        when = self.distributions[key].when
        owners = self._owners(key)
        seen: dict[str, set[str]] = {condition: set() for condition in when}
        for trial in self._trials(self._corners_for(owners)):
            values = self.values(trial)
            for condition in when:
                found = lookup(values, condition)
                seen[condition].add("absent" if found is _ABSENT else json.dumps(found))
        raise ConfigError(
            "no trial can have this key: its condition never holds",
            where=f"{where}.{key}.when",
            found=", ".join(f"{condition}: {json.dumps(wanted)}" for condition, wanted in when.items()),
            expected="\n".join(f"{condition}: {' or '.join(sorted(found))}" for condition, found in seen.items()),
            fix="correct the condition, or remove the key",
        )

    def values(self, trial: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's values with those of a trial, nested."""
        values = dict(self.recipe)
        for key, value in trial.items():
            values = merge(values, nested(key, value))
        return values

    def _corners_of(self, key: str) -> list[dict[str, Any]]:
        """Trials with ``key`` at all its corners, over all values of the keys that decide whether it is there."""
        varied = {key, *self._owners(key)}
        return [trial for trial in self._trials(self._corners_for(varied)) if key in trial]

    def _corners_for(self, varied: set[str]) -> Callable[[str, Distribution], Sequence[Any]]:
        return lambda key, distribution: distribution.corners if key in varied else distribution.corners[:1]

    def _owners(self, key: str) -> set[str]:
        """The keys of the space that decide, directly or through another key, whether a trial has ``key``."""
        direct = {setter for condition in self.distributions[key].when for setter in self._setters(condition)}
        return direct.union(*(self._owners(setter) for setter in direct))

    def _setters(self, key: str) -> list[str]:
        """The keys of the space whose value sets ``key`` of the recipe."""
        return [own for own in self.distributions if key == own or key.startswith(own + ".")]

    def _trials(self, values_of: Callable[[str, Distribution], Sequence[Any]]) -> Iterator[dict[str, Any]]:
        items = list(self.distributions.items())

        def extended(index: int, trial: dict[str, Any], recipe: dict[str, Any]) -> Iterator[dict[str, Any]]:
            if index == len(items):
                yield trial
                return
            key, distribution = items[index]
            if not all(_holds(recipe, *condition) for condition in distribution.when.items()):
                yield from extended(index + 1, trial, recipe)
                return
            for value in values_of(key, distribution):
                yield from extended(index + 1, {**trial, key: value}, merge(recipe, nested(key, value)))

        return extended(0, {}, dict(self.recipe))


def nested(key: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for ``a.b``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """What stands under a dotted key; a marker that equals nothing else where there is none."""
    node: Any = values
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _ABSENT
        node = node[part]
    return node


def _holds(recipe: Mapping[str, Any], key: str, wanted: Any) -> bool:
    found = lookup(recipe, key)
    return found in wanted if isinstance(wanted, list) else bool(found == wanted)
