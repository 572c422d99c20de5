"""What the benchmarks share: contenders in their own processes, paired repeats, and the result file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


class Contender:
    """A process that takes one JSON order a line and answers each with one JSON line.

    Args:
        script: the contender's Python file.
        spec: what it is told at its start, as JSON in its first argument.
        python: the interpreter it runs under, for one that needs another environment.
    """

    def __init__(self, script: Path, spec: Mapping[str, Any], *, python: str = sys.executable) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read if the process ends early)
        self._process = subprocess.Popen(
            [python, str(script), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        """Sends an order and waits for its answer.

        Raises:
            RuntimeError: the process ended; the message is the end of its stderr.
        """
        orders, answers = self._process.stdin, self._process.stdout
        assert orders is not None
        assert answers is not None
        try:
            orders.write(json.dumps(order) + "\n")
            orders.flush()
            for line in answers:
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        except BrokenPipeError:
            pass
        self._errors.seek(0)
        raise RuntimeError(f"a contender ended early:\n{self._errors.read()[-2000:]}")

    def close(self) -> None:
        """Ends the process by closing its input."""
        self._process.communicate()
        self._errors.close()


@dataclass(frozen=True)
class Ratio:
    """``numerator / denominator`` of paired repeats: each pair was measured one right after the other."""

    numerator: Sequence[float]
    denominator: Sequence[float]

    @property
    def pairs(self) -> list[float]:
        """The ratio of each pair."""
        return [a / b for a, b in zip(self.numerator, self.denominator, strict=True)]

    @property
    def median(self) -> float:
        """The middle pair."""
        return statistics.median(self.pairs)

    def as_json(self) -> dict[str, Any]:
        """Median, extremes and all pairs."""
        pairs = [round(pair, 4) for pair in self.pairs]
        return {"median": round(self.median, 4), "min": min(pairs), "max": max(pairs), "pairs": pairs}


def environment(*packages: str) -> dict[str, Any]:
    """Versions and the size of the machine."""
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def write_result(name: str, content: Mapping[str, Any]) -> Path:
    """Writes ``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
