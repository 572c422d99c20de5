"""What the documents show can be typed: every `raydist` command parses, every file and make target they name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jobs import quickstart
from raydist.cli.main import VERBS, build_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")] if ".venv" not in path.parts)


def commands(path: Path) -> list[str]:
    """Lines of code blocks that begin with ``raydist``, with or without a prompt."""
    lines = re.findall(r"^(?: {4}|\$ |)\$? ?(raydist [a-z][^\n`]*)$", path.read_text(), flags=re.MULTILINE)
    return [re.split(r"\s{2,}#", line)[0].strip() for line in lines]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_parses(path: Path) -> None:
    for command in commands(path):
        words = shlex.split(command)[1:]
        assert words[0] in VERBS, command
        try:
            build_parser(words[0]).parse_known_args(words)
        except SystemExit as end:
            pytest.fail(f"{path.name}: {command!r} ends with {end.code}")


def test_the_readme_shows_every_verb() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(commands(ROOT / "README.md")) >= 8
    assert [verb for verb in VERBS if f"`raydist {verb}" not in text] == []


def test_the_readme_shows_what_the_quickstart_types() -> None:
    """Other words would be refused as another dataset behind a quickstart, and the other way round."""
    typed = [f"raydist {shlex.join(words)}" for _, words in quickstart.commands("LIBRARY")]
    assert [command for command in commands(ROOT / "README.md") if command in typed] == typed


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_exists(path: Path) -> None:
    named = re.findall(
        r"`((?:raydist|data_loaders|jobs|tests|benchmarks|docs|clusters|sweeps)/[\w./-]*)`", path.read_text()
    )
    linked = [name for name in re.findall(r"\]\(([^)#:]+)\)", path.read_text())]
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in linked if not (path.parent / name).exists()]
    assert missing == []


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for path in DOCUMENTS:
        assert set(re.findall(r"\bmake ([a-z][a-z-]+)\b", path.read_text())) <= targets | {"sure"}, path.name


def test_the_house_is_drawn_as_it_stands() -> None:
    """The table of packages names every package, and no other."""
    drawn = set(
        re.findall(r"^\| `((?:raydist/)?\w+/)`", (ROOT / "docs" / "how_it_works.md").read_text(), flags=re.MULTILINE)
    )
    packages = {f"raydist/{path.parent.name}/" for path in ROOT.glob("raydist/*/__init__.py")}
    assert drawn == packages | {"data_loaders/"}
