"""Writes the table of faults in docs/reliability.md from what the tests have recorded.

RAYDIST_FAULT_RECORDS=runs/faults.jsonl pytest tests/faults
python benchmarks/reliability.py runs/faults.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from common import ROOT, environment

PAGE = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- faults: begin -->", "<!-- faults: end -->"


def read(path: Path) -> list[dict[str, Any]]:
    """One record for each fault, in the order in which they were first seen; the newest counts."""
    newest: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        newest[record["fault"]] = record
    return list(newest.values())


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| fault | what happened | steps lost | seconds to recover |", "|---|---|---|---|"]
    for record in records:
        cells = [record["fault"], record["outcome"], _or_dash(record["steps_lost"]), _or_dash(record["recovery_s"])]
        rows.append(f"| {' | '.join(cells)} |")
    versions = environment("ray", "torch")
    rows += ["", f"Measured on {versions['cpus']} CPUs with Ray {versions['ray']} and torch {versions['torch']}."]
    return "\n".join(rows)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="the file that RAYDIST_FAULT_RECORDS named")
    args = parser.parse_args()
    block = f"{_BEGIN}\n{table(read(args.records))}\n{_END}"
    page, count = re.subn(f"{_BEGIN}.*?{_END}", lambda _: block, PAGE.read_text(), flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE}: one pair of {_BEGIN} and {_END} is needed")
    PAGE.write_text(page)
    print(PAGE)


if __name__ == "__main__":
    main()
