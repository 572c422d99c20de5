"""Errors a user can act on.

Every mistake that a user can make, in a recipe, a dataset, a checkpoint or a server address, ends in one of these.
The command line prints ``str(error)``, which fits one screen, and exits with code 2; a traceback is for our bugs only.
Instances survive pickling, because Ray carries them from a worker to the driver.
"""

from __future__ import annotations

from typing import Self

_MAX_FIELD_LINES = 14
_MAX_LINE_CHARS = 500


class RaydistError(Exception):
    """A mistake that the user can mend.

    Args:
        what: one sentence that says what is wrong.
        where: the configuration key, file or address it is about.
        found: what was there.
        expected: what should have been there.
        fix: what to do now, preferably a command to copy.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.fix = fix

    def __reduce__(self) -> tuple[object, tuple[type[RaydistError], dict[str, str | None]]]:
        return _rebuild, (type(self), self.fields())

    def fields(self) -> dict[str, str | None]:
        """The parts of the message, for ``--json`` output and for the trip through Ray."""
        return {
            "what": self.what,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix,
        }

    def moved_to(self, where: str) -> Self:
        """The same error about another place."""
        return type(self)(self.what, where=where, found=self.found, expected=self.expected, fix=self.fix)

    def __str__(self) -> str:
        lines = [f"{type(self).__name__}: {' '.join(_clipped(self.what))}"]
        for label in ("where", "found", "expected", "fix"):
            text = getattr(self, label)
            if text is not None:
                first, *rest = _clipped(text)
                lines.append(f"  {label + ':':<10}{first}")
                lines.extend(" " * 12 + line for line in rest)
        return "\n".join(lines)


def _clipped(text: str) -> list[str]:
    """A field's lines as they fit a screen: what was found in a damaged file may be anything."""
    lines = [line if len(line) <= _MAX_LINE_CHARS else line[:_MAX_LINE_CHARS] + " ..." for line in text.splitlines()]
    if len(lines) > _MAX_FIELD_LINES:
        lines[_MAX_FIELD_LINES - 1 :] = [f"... and {len(lines) - _MAX_FIELD_LINES + 1} more lines"]
    return lines or [""]


def _rebuild(kind: type[RaydistError], fields: dict[str, str | None]) -> RaydistError:
    what = fields.pop("what") or ""
    return kind(what, **fields)


class ConfigError(RaydistError):
    """A recipe, an override or a combination of keys is wrong."""


class DataError(RaydistError):
    """A dataset is missing, damaged, or does not fit the run."""


class TokenizerError(RaydistError):
    """A tokenizer cannot be read, or does not fit the data or the model."""


class ModelError(RaydistError):
    """Weights or a model configuration cannot be used."""


class CheckpointError(RaydistError):
    """A checkpoint is incomplete or damaged."""


class StorageError(RaydistError):
    """A bucket cannot be reached, or refuses what was asked of it."""


class ResumeError(RaydistError):
    """A run cannot go on from what is stored under its name."""


class CapacityError(RaydistError):
    """Memory, disk or the cluster is too small for what was asked."""


class ClusterError(RaydistError):
    """A Ray cluster, or a job on it, does not answer or cannot be used."""


class TrackingError(RaydistError):
    """The tracking server or a run on it cannot be used."""


class NonFiniteError(RaydistError):
    """The loss or the gradient norm stopped being a number; no weight was changed by that step."""
