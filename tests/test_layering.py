"""The arrows of the house: which package may import which, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_CORE = {"core"}
_BASE = {"core", "config"}
MAY_IMPORT = {
    "core": set(),
    "config": _CORE,
    "data_loaders": _CORE,
    "paths": _BASE,
    "models": _BASE,
    "objectives": {*_BASE, "paths", "models.mask_spec"},
    "fsdp_utils": {*_BASE, "models"},
    "sampling": {*_BASE, "paths", "models"},
    "checkpoint": {*_BASE, "fsdp_utils"},
    "tracking": _BASE,
    "evaluation": {*_BASE, "paths", "models", "objectives", "sampling", "tracking"},
    "serving": {*_BASE, "models", "sampling", "tracking", "data_loaders"},
    "training": {
        *_BASE, "paths", "models", "objectives", "fsdp_utils", "sampling", "checkpoint", "tracking", "evaluation",
        "data_loaders",
    },
}  # fmt: skip
MAY_IMPORT["runtime"] = {*MAY_IMPORT["training"], "training", "serving"}
MAY_IMPORT["cli"] = {*MAY_IMPORT["runtime"], "runtime"}

# third-party package -> the only places that may import it
ONLY_IN = {
    "ray": ("raydist/runtime/",),
    "mlflow": ("raydist/tracking/", "raydist/serving/"),
    "fsspec": ("raydist/core/storage.py",),
    "s3fs": ("raydist/core/storage.py",),
    "transformers": ("data_loaders/tokenizer_sources.py",),
    "omegaconf": ("raydist/config/",),
    "pickle": (),
    "torchvision": (),
}


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("raydist/**/*.py"), *ROOT.glob("data_loaders/**/*.py")])


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.ImportFrom):
            found.add("relative import")
    return found


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "data_loaders" if parts[0] == "data_loaders" else parts[1]


def ours(module: str) -> str | None:
    """``raydist.models.hf`` as ``models.hf``, ``data_loaders.x`` as ``data_loaders``, others as None."""
    if module.split(".")[0] == "data_loaders":
        return "data_loaders"
    parts = module.split(".")
    return ".".join(parts[1:3]) if parts[0] == "raydist" and len(parts) > 1 else None


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_go_down_only(package: str) -> None:
    files = [path for path in source_files() if path.name != "__init__.py" and package_of(path) == package]
    assert files, f"no modules in {package}"
    wrong = []
    for path in files:
        for name in filter(None, map(ours, imported_modules(path))):
            top = name.split(".")[0]
            allowed = MAY_IMPORT[package] | {package}
            if top == "__version__" or top in allowed or name in allowed:
                continue
            if any(entry.startswith(name + ".") for entry in allowed):
                continue  # the package half of "from raydist.models import mask_spec"
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_package_is_in_the_table() -> None:
    packages = {package_of(path) for path in source_files() if path.parent != ROOT / "raydist"}
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_libraries_stay_where_they_belong(library: str) -> None:
    wrong = []
    for path in source_files():
        name = str(path.relative_to(ROOT))
        uses = any(module.split(".")[0] == library for module in imported_modules(path))
        if uses and not name.startswith(ONLY_IN[library]):
            wrong.append(name)
    assert not wrong, f"{library} is imported by {wrong}"


def test_no_relative_imports_and_no_module_out_of_hand() -> None:
    assert not [path for path in source_files() if "relative import" in imported_modules(path)]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in source_files()}
    assert not {name: lines for name, lines in long.items() if lines > 400}
