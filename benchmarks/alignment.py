"""Optimal alignments per second against a plain Python dynamic program, in interleaved repeats on one thread each.

    python benchmarks/alignment.py [--repeats 9] [--length 256]

Both sides (``alignment_contenders.py``) run in processes of their own and align the same random pairs of sequences, as an
objective's batch holds them: lengths between three quarters of the length and all of it, x1 an edited copy of x0 or unrelated
to it. Every alignment's number of edits is compared before anything is measured. The plain program aligns a few pairs of the
batch a time, because the whole batch would take seconds; a ratio is of two measurements of one round.

One diagonal of the table costs about the same for a few pairs as for many, so the ratio grows with the batch; both sizes are
in the result, and the goal is that of the larger one.

The result goes to ``benchmarks/results/alignment.json``.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import Contender, Ratio, environment, write_result

SCRIPT = Path(__file__).resolve().parent / "alignment_contenders.py"
GOAL = 100.0
PLAIN_PAIRS = 6
BATCH_PAIRS, SMALL_BATCH_PAIRS = 128, 16


def compare(*, kind: str, length: int, pairs: int, repeats: int) -> dict[str, Any]:
    """One case: both contenders in turn."""
    contenders = {name: Contender(SCRIPT, {"name": name}) for name in ("raydist", "plain")}
    try:
        data = {"kind": kind, "length": length, "pairs": pairs}
        limits = {"raydist": pairs, "plain": PLAIN_PAIRS}
        checks = {
            name: contender.ask(order="check", **data, limit=limits[name])["edits"][:PLAIN_PAIRS]
            for name, contender in contenders.items()
        }
        if checks["raydist"] != checks["plain"]:
            raise SystemExit(f"the alignments have different numbers of edits: {checks}")
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(repeats):
            for name, contender in contenders.items():
                answer = contender.ask(order="measure", **data, limit=limits[name])
                speeds[name].append(answer["alignments"] / answer["wall_s"])
    finally:
        for contender in contenders.values():
            contender.close()
    ratio = Ratio(speeds["raydist"], speeds["plain"])
    return {
        **data,
        "edits_of_the_compared_pairs": checks["plain"],
        "alignments_per_s": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "speed_ratio": ratio.as_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    cases = [
        compare(kind=kind, length=args.length, pairs=pairs, repeats=args.repeats)
        for kind in ("edited", "unrelated")
        for pairs in (BATCH_PAIRS, SMALL_BATCH_PAIRS)
    ]
    reached = min(case["speed_ratio"]["median"] for case in cases if case["pairs"] == BATCH_PAIRS)
    content = {
        "what": "optimal (Levenshtein) alignments, with their columns, of a batch of pairs, one thread",
        "environment": environment("numpy", "torch"),
        "cases": cases,
        "goals": {
            f"speed relative to a plain Python dynamic program, in batches of {BATCH_PAIRS}": {
                "goal": GOAL,
                "reached": reached,
                "met": reached >= GOAL,
            }
        },
    }
    print(write_result("alignment", content))


if __name__ == "__main__":
    main()
