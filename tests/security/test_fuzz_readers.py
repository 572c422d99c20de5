"""Five hundred mutated files: each is refused in one screen or loads; none crashes, hangs or writes outside its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.security import fuzz_readers
from tests.security.fuzz_readers import READERS, ROOT

FILES_PER_KIND = 100


@pytest.mark.parametrize("kind", sorted(READERS))
def test_mutated_files_are_refused_or_load(kind: str, tmp_path: Path) -> None:
    assert len(READERS) * FILES_PER_KIND == 500
    sandbox = tmp_path / "sandbox" / "inner"
    sandbox.mkdir(parents=True)
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.fuzz_readers", kind, str(sandbox / "work"), str(FILES_PER_KIND)],
        cwd=sandbox, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"file"')]
    assert done.returncode == 0, f"the reader ended the process at {rows[-1:]}:\n{done.stderr[-2000:]}"
    outcomes = {row["file"]: row for row in rows if row["outcome"] != "reading"}
    assert len(outcomes) == FILES_PER_KIND
    bad = [row for row in outcomes.values() if row["outcome"] not in ("refused", "loaded")]
    assert not bad, f"{len(bad)} findings, first: {bad[0]['file']} {bad[0]['outcome']}\n{bad[0]['detail']}"
    counts = Counter(row["outcome"] for row in outcomes.values())
    assert counts["refused"] > counts["loaded"] > 0, counts
    strays = [
        path for path in (tmp_path / "sandbox").rglob("*") if "work" not in path.relative_to(sandbox.parent).parts
    ]
    assert strays == [sandbox]
    assert not [
        path for path in sandbox.rglob("*") if "ESCAPE" in path.name and "target" not in path.relative_to(sandbox).parts
    ]
    assert not [path for path in home.rglob("*") if "ESCAPE" in path.name]
    assert not Path("/tmp/ESCAPE").exists()


def _wait() -> None:
    time.sleep(30)


def _compute() -> None:
    while True:
        pass


@pytest.mark.parametrize(("limit", "read"), [("WALL_LIMIT_S", _wait), ("CPU_LIMIT_S", _compute)])
def test_a_reader_that_does_not_end_is_a_finding(
    limit: str, read: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = READERS["recipes"](tmp_path)
    monkeypatch.setattr(reader, "read", read)
    monkeypatch.setattr(fuzz_readers, limit, 0.2)
    before = {alarm: signal.getsignal(alarm) for alarm in (signal.SIGPROF, signal.SIGALRM)}
    fuzz_readers.watch_for_hangs()
    try:
        assert fuzz_readers.outcome_of(reader)["outcome"] == "hang"
    finally:
        for alarm, handler in before.items():
            signal.signal(alarm, handler)
