"""The table of docs/reliability.md holds every fault that a test of this folder records, and no other."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from tests.faults.save_points import POINTS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
LISTS = {"POINTS": list(POINTS)}
ANYTHING = "..."


def calls_by_function(
    tree: ast.AST, function: ast.FunctionDef | None = None
) -> Iterator[tuple[ast.FunctionDef, ast.Call]]:
    """Each call with the innermost function around it."""
    for node in ast.iter_child_nodes(tree):
        inside = node if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Call) and inside is not None:
            yield inside, node
        yield from calls_by_function(node, inside)


def parametrized(function: ast.FunctionDef, name: str) -> list[str]:
    """The strings that pytest gives to an argument."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize":
            names, values = decorator.args
            if isinstance(values, ast.Name) and ast.literal_eval(names) == name:
                return LISTS[values.id]
            if isinstance(values, ast.List) and name in ast.literal_eval(names):
                column = ast.literal_eval(names).index(name)
                return [ast.literal_eval(row.elts[column]) for row in values.elts if isinstance(row, ast.Tuple)]
    return []


def texts(words: ast.expr, function: ast.FunctionDef) -> list[str]:
    """What a fault may be called, with dots for values that only a run knows."""
    if isinstance(words, ast.Constant):
        return [str(words.value)]
    if isinstance(words, ast.Name):
        assigned = [
            node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == words.id
        ]
        return parametrized(function, words.id) or [text for value in assigned for text in texts(value, function)]
    if isinstance(words, ast.JoinedStr):
        return ["".join(parts) for parts in itertools.product(*(texts(part, function) for part in words.values))]
    if isinstance(words, ast.FormattedValue):
        return texts(words.value, function) or [ANYTHING]
    return [ANYTHING]


def recorded(path: Path) -> list[str]:
    """The faults of ``record_fault(FAULT, ...)`` and ``survives(..., fault=FAULT)`` in a module."""
    found = []
    for function, call in calls_by_function(ast.parse(path.read_text())):
        if ast.unparse(call.func) == "record_fault":
            fault = call.args[0]
        elif ast.unparse(call.func) == "survives":
            (fault,) = (keyword.value for keyword in call.keywords if keyword.arg == "fault")
        else:
            continue
        if function.name == "check" and ast.unparse(fault) in [one.arg for one in function.args.kwonlyargs]:
            continue  # what survives() was called with
        names = texts(fault, function)
        assert names, f"{path.name}:{call.lineno}: {ast.unparse(fault)} has no value that can be read"
        assert ANYTHING not in names, f"{path.name}:{call.lineno}: a fault whose name is not written down"
        found += names
    return found


def rows_of_page() -> list[str]:
    table = PAGE.read_text().partition("<!-- faults: begin -->")[2].partition("<!-- faults: end -->")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == "fault"
    return rows[1:]


def test_the_page_has_every_fault_and_no_other() -> None:
    faults = [fault for path in sorted(HERE.glob("test_*.py")) for fault in recorded(path)]
    assert {f"SIGKILL during a save, when {point}" for point in POINTS} <= set(faults)
    rows = rows_of_page()
    patterns = {fault: re.compile(re.escape(fault).replace(re.escape(ANYTHING), ".+")) for fault in faults}
    missing = [fault for fault in faults if not any(patterns[fault].fullmatch(row) for row in rows)]
    stale = [row for row in rows if not any(pattern.fullmatch(row) for pattern in patterns.values())]
    assert not missing, f"{len(missing)} faults are not on the page, run `make reliability`: " + "; ".join(missing)
    assert not stale, "no test records these rows of the page: " + "; ".join(stale)
