"""What travels with a job: an allow-list of small files, in a folder of its own that Ray packs."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from raydist.core.errors import ConfigError
from raydist.core.units import format_bytes

MAX_PACKAGE_BYTES = 20 * 2**20
_NUM_SHOWN = 10
_CODE_PACKAGES = ("raydist", "data_loaders")
_CODE_SUFFIXES = (".py", ".typed")
_MAX_FILES = 10_000


@dataclass(frozen=True)
class Package:
    """A folder ready to be sent.

    Attributes:
        folder: its path, which lasts as long as the block of :func:`packed`.
        sizes: relative name to bytes.
    """

    folder: str
    sizes: dict[str, int]

    @property
    def size_bytes(self) -> int:
        """All files together, before Ray's compression."""
        return sum(self.sizes.values())


@contextmanager
def packed(files: dict[str, str], *, include: Sequence[str] = (), ship_code: bool = False) -> Iterator[Package]:
    """Gathers what a job needs; nothing else of the working folder ever leaves the machine.

    Args:
        files: relative name to text, e.g. the resolved recipe.
        include: globs below the current folder; dot files have to be named as such.
        ship_code: add the source of this raydist.

    Raises:
        ConfigError: a glob matches nothing or leaves the folder, or everything together is larger than 20 MiB.
    """
    with tempfile.TemporaryDirectory(prefix="raydist-job-") as folder:
        sources = {**_included(include), **(_code() if ship_code else {})}
        sizes = {name: os.path.getsize(path) for name, path in sources.items()}
        sizes.update({name: len(text.encode()) for name, text in files.items()})
        package = Package(folder, sizes)
        _require_small(package)
        for name, path in sources.items():
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(path, target)
        for name, text in files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as stream:
                stream.write(text)
        yield package


def _included(globs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    root = os.path.realpath(os.curdir)
    for pattern in globs:
        names = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        if not names:
            raise ConfigError(
                "no file to send", where="runtime_env.include", found=pattern, expected=f"files in {root}"
            )
        for name in names:
            if not os.path.realpath(name).startswith(root + os.sep):
                raise ConfigError("a file to send lies elsewhere", where="runtime_env.include", found=name)
            found[os.path.normpath(name)] = name
            if len(found) > _MAX_FILES:
                raise ConfigError(
                    "too many files to send", where="runtime_env.include", expected=f"at most {_MAX_FILES}"
                )
    return found


def _code() -> dict[str, str]:
    import raydist

    parent = os.path.dirname(os.path.dirname(os.path.abspath(raydist.__file__)))
    found: dict[str, str] = {}
    for package in _CODE_PACKAGES:
        for folder, _, names in os.walk(os.path.join(parent, package)):
            for name in names:
                if name.endswith(_CODE_SUFFIXES):
                    path = os.path.join(folder, name)
                    found[os.path.relpath(path, parent)] = path
    return found


def _require_small(package: Package) -> None:
    if package.size_bytes <= MAX_PACKAGE_BYTES:
        return
    largest = sorted(package.sizes.items(), key=lambda item: -item[1])[:_NUM_SHOWN]
    raise ConfigError(
        "the job's files are too large to be sent",
        where="runtime_env.include",
        found=f"{format_bytes(package.size_bytes)} in {len(package.sizes)} files; the largest:\n"
        + "\n".join(f"{format_bytes(size):>10}  {name}" for name, size in largest),
        expected=f"at most {format_bytes(MAX_PACKAGE_BYTES)}",
        fix="put data and weights in a bucket or into the image, and send only what is small",
    )
