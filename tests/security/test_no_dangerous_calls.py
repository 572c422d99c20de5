"""What the packages never call: anything by which data becomes code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("raydist", "data_loaders", "jobs") for path in (ROOT / folder).rglob("*.py"))
_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "yaml.load",
    "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all", "os.system",
    "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "pd.read_pickle",
    "pandas.read_pickle", "tarfile.open", "shutil.unpack_archive",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def findings(source: str) -> list[str]:
    """Line and reason of every call or import in a module that turns data into code or hands text to a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            if module.split(".")[0] in _MODULES or names & _CALLS:
                found.append(f"{node.lineno}: from {module}")
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            for name, forbidden in (
                ("allow_pickle", True),
                ("shell", True),
                ("weights_only", False),
                ("verify", False),
            ):
                value = keywords.get(name)
                if isinstance(value, ast.Constant) and value.value is forbidden:
                    found.append(f"{node.lineno}: {name}={forbidden}")
            if dotted(node.func) in _CALLS:
                found.append(f"{node.lineno}: {dotted(node.func)}()")
            if dotted(node.func) in ("np.load", "numpy.load") and "allow_pickle" not in keywords:
                found.append(f"{node.lineno}: np.load() without allow_pickle=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_turns_data_into_code(path: Path) -> None:
    assert not findings(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(p)", "yaml.load(s, Loader=yaml.Loader)",
        "eval('1')", "exec(s)", "np.load(p)", "np.load(p, allow_pickle=True)", "subprocess.run(s, shell=True)", "os.system(s)",
        "from yaml import unsafe_load", "from torch import load", "load(p, weights_only=False)",
    ],
)  # fmt: skip
def test_the_search_finds_each_kind(source: str) -> None:
    assert findings(source)


def test_the_search_lets_safe_calls_pass() -> None:
    assert not findings(
        "model.eval()\nre.compile('x')\nyaml.safe_load(s)\nnp.load(p, allow_pickle=False)\nsafe_open(p)"
    )
