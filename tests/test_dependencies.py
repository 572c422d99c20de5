"""Every library the sources import is asked for in pyproject.toml and pinned in constraints.txt.

A library that is only there because another one happens to install it is missing on the next fresh machine.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_layering import ROOT, imported_modules

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_EXTRAS = _PROJECT["optional-dependencies"]
_OURS = {"raydist", "data_loaders", "jobs", "tests"}
_DISTRIBUTION = {"yaml": "pyyaml", "pydantic-core": "pydantic"}  # import name -> what installs it, where they differ


def names(requirements: list[str]) -> set[str]:
    """Distribution names of requirement lines: ``ray[train]>=2`` is ``ray``."""
    return {normalised(re.split(r"[\[<>=!~ ;]", line)[0]) for line in requirements}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


INSTALLED = names(_PROJECT["dependencies"])
FOR_TESTS = INSTALLED | names(_EXTRAS["dev"])
FOR_USERS = INSTALLED | names([line for extra in ("demo", "sweep") for line in _EXTRAS[extra]])


def undeclared(folder: str, declared: set[str]) -> dict[str, list[str]]:
    """Library -> the files below ``folder`` that import it although ``declared`` lacks it."""
    found: dict[str, list[str]] = {}
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no sources in {folder}"
    for path in files:
        for library in {module.split(".")[0] for module in imported_modules(path)}:
            if library in sys.stdlib_module_names or library in _OURS:
                continue
            name = normalised(library)
            if _DISTRIBUTION.get(name, name) not in declared:
                found.setdefault(library, []).append(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    ("folder", "declared"),
    [("raydist", FOR_USERS), ("data_loaders", INSTALLED), ("jobs", FOR_USERS), ("tests", FOR_TESTS)],
    ids=["raydist", "data_loaders", "jobs", "tests"],
)
def test_what_is_imported_is_declared(folder: str, declared: set[str]) -> None:
    assert undeclared(folder, declared) == {}


def test_a_library_nobody_asked_for_is_found() -> None:
    assert "boto3" in undeclared("tests", FOR_TESTS - {"boto3"})


def test_what_is_declared_is_pinned() -> None:
    pins = names(Path(ROOT / "constraints.txt").read_text().splitlines())
    assert (FOR_TESTS | FOR_USERS) - pins == set()
