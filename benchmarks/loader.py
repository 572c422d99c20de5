"""Tokens per second of the loader beside other loaders, on the same rows, in interleaved repeats on one thread each.

    python benchmarks/loader.py [--peer-python PATH] [--repeats 7] [--tokens 33554432]

Two shapes of batches: what a rank of the recipes for 8B models reads in a step, and rows of a small model, where the record of
each row costs more beside its tokens. Every contender (``loader_contenders.py``) runs in its own process, so that the peers may
live in another virtual environment. All read every row in a random order, in batches of int64 rows, and the sums of all tokens
must agree. Only raydist also makes document numbers, row ids and epochs. It, litdata and streaming shuffle by themselves, from
several files; numpy memmap and datasets index one table with an order drawn before. numpy memmap is the bar, not a loader.

A ratio is taken of two measurements of the same round, and the median of these ratios is the result. It goes to
``benchmarks/results/loader.json``, with the time that each part of the loader takes for a batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import Contender, Ratio, environment, write_result
from loader_contenders import ENTRIES, NUM_SHARDS, Shape, open_mixture, write_dataset, write_rows

SCRIPT = Path(__file__).resolve().parent / "loader_contenders.py"
OWN, BAR, BY_HAND = "raydist", "numpy memmap", "datasets, arrow format"
SHAPES = {"8B recipes": Shape(seq_len=4096, batch_rows=8), "short rows": Shape(seq_len=512, batch_rows=32)}
RESUME_ROW, RESUME_SHAPE, RESUME_ROWS = 1_000_000, Shape(seq_len=16, batch_rows=32), 1_100_000
BAR_GOAL, PEER_GOAL, RESUME_GOAL_MS = 0.5, 10.0, 100.0
LOCATED_TOKENS, CHUNK_TOKENS = 1 << 25, 1 << 19  # located and copied at once, as the loader does


def measure_passes(contenders: Mapping[str, Contender], *, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Passes of all contenders in turn, after a check that all read the same rows."""
    checks = {name: contender.ask(order="check") for name, contender in contenders.items()}
    if len({(check["num_rows"], check["checksum"]) for check in checks.values()}) != 1:
        raise SystemExit(f"the contenders read different rows: {checks}")
    passes: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            passes[name].append(contender.ask(order="measure"))
    return passes


def compare(folder: Path, shape: Shape, *, peer_python: str, repeats: int) -> list[dict[str, Any]]:
    """All contenders on the rows of a folder, with raydist's ratio to each."""
    contenders = {
        name: Contender(
            SCRIPT,
            {"name": name, "folder": str(folder), "shape": asdict(shape)},
            python=sys.executable if name in (OWN, BAR) else peer_python,
        )
        for name in ENTRIES
    }
    try:
        hellos = {name: contender.ask(order="open") for name, contender in contenders.items()}
        present = {name: contenders[name] for name, hello in hellos.items() if "absent" not in hello}
        passes = measure_passes(present, repeats=repeats)
    finally:
        for contender in contenders.values():
            contender.close()
    return [
        {"name": name, "work": ENTRIES[name].work, **hellos[name]}
        | (_summary(passes[name], shape, own=passes[OWN]) if name in passes else {})
        for name in ENTRIES
    ]


def _summary(passes: Sequence[Mapping[str, Any]], shape: Shape, *, own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    speeds = [one["num_rows"] * shape.seq_len / one["wall_s"] for one in passes]
    own_speeds = [one["num_rows"] * shape.seq_len / one["wall_s"] for one in own]
    return {
        "tokens_per_s": {
            "median": round(statistics.median(speeds)),
            "min": round(min(speeds)),
            "max": round(max(speeds)),
        },
        "wall_us_per_batch": _us_per_batch(passes, "wall_s", shape),
        "cpu_us_per_batch": _us_per_batch(passes, "cpu_s", shape),
        "raydist_speed_ratio": Ratio(own_speeds, speeds).as_json(),
    }


def _us_per_batch(passes: Sequence[Mapping[str, Any]], clock: str, shape: Shape) -> float:
    return round(statistics.median(1e6 * one[clock] * shape.batch_rows / one["num_rows"] for one in passes), 1)


def parts_us_per_batch(folder: Path, shape: Shape, *, repeats: int) -> dict[str, float]:
    """Microseconds that the loader's parts take for a batch, each alone on one thread; medians."""
    import numpy as np

    from data_loaders.gather import gather

    mixture = open_mixture(folder, seq_len=shape.seq_len)
    part_rows, chunk_rows = (tokens // shape.seq_len for tokens in (LOCATED_TOKENS, CHUNK_TOKENS))
    chunks = [np.arange(first, first + part_rows) for first in range(0, mixture.num_rows - part_rows + 1, part_rows)]
    num_batches = len(chunks) * part_rows // shape.batch_rows

    def microseconds(part: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
        laps = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for one in inputs:
                part(one)
            laps.append(1e6 * (time.perf_counter() - start) / num_batches)
        return statistics.median(laps[1:])

    order = microseconds(mixture.locate, chunks)

    def copied(samples_N: Any) -> int:
        return sum(len(chunk.rows_N) for chunk in gather(mixture, samples_N, chunk_rows=chunk_rows))

    def taken(samples_N: Any) -> int:
        chunks = gather(mixture, samples_N, chunk_rows=chunk_rows)
        return sum(len(rows) for chunk in chunks for rows in chunk.batches(shape.batch_rows, first_step=0))

    read = microseconds(copied, chunks)
    batches = microseconds(taken, chunks) - read
    return {
        "order": round(order, 1),
        "rows out of shards, document numbers": round(read - order, 1),
        "cast, record": round(batches, 1),
    }


def resume_ms(folder: Path, *, repeats: int) -> list[float]:
    """Milliseconds from nothing opened to the first batch at ``RESUME_ROW``, with the shards on the node."""
    import numpy as np

    from data_loaders.loader import Loader

    seq_len = RESUME_SHAPE.seq_len
    write_dataset(folder / "raydist", np.zeros(RESUME_ROWS * seq_len + 1, dtype=np.uint16), seq_len=seq_len)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        mixture = open_mixture(folder, seq_len=seq_len)
        loader: Loader[Any] = Loader(mixture, batch_rows=RESUME_SHAPE.batch_rows, start_sample=RESUME_ROW)
        next(iter(loader))
        times.append(round(1e3 * (time.perf_counter() - start), 2))
        loader.close()
    return times[1:]


def judge(results: Sequence[Mapping[str, Any]], parts: Mapping[str, float]) -> dict[str, Any]:
    """The goals of a shape, what was reached, and what stands against those that were missed."""
    present = {result["name"]: result for result in results if "absent" not in result}
    ratios = {name: result["raydist_speed_ratio"]["median"] for name, result in present.items()}
    goals: dict[str, Any] = {
        f"speed relative to {BAR}": _goal(
            ratios[BAR],
            BAR_GOAL,
            met=ratios[BAR] >= BAR_GOAL,
            limit=bar_limit(present[BAR]["wall_us_per_batch"], parts),
        )
    }
    for way, names in (("as documented", {OWN, BAR, BY_HAND}), ("or decoded by hand", {OWN, BAR})):
        peers = sorted(ratios.keys() - names, key=ratios.__getitem__)
        if peers:
            best = peers[0]
            speed, peer = (present[name]["tokens_per_s"]["median"] for name in (BAR, best))
            goals[f"speed relative to the best peer {way}, {best}"] = _goal(
                ratios[best],
                PEER_GOAL,
                met=ratios[best] >= PEER_GOAL,
                limit=f"Ten times this peer is {PEER_GOAL * peer / speed:.2f} times {BAR}, which only gathers and casts.",
            )
    return goals


def bar_limit(bar_us: float, parts: Mapping[str, float]) -> str:
    """What the loader's parts take beside what the goal allows."""
    listed = "; ".join(f"{name}: {microseconds:.1f}" for name, microseconds in parts.items())
    return (
        f"{BAR} only gathers and casts, in {bar_us:.1f} us a batch, so that the goal allows {bar_us / BAR_GOAL:.1f} us. The "
        f"loader's parts, each alone, take {sum(parts.values()):.1f} us ({listed}): beside the gather and the cast they hold "
        "the order, sorting rows by shard and back, document numbers, and six tensors and a record a batch."
    )


def _goal(reached: float, goal: float, *, met: bool, limit: str | None = None) -> dict[str, Any]:
    return {"reached": reached, "goal": goal, "met": met} | ({} if met or limit is None else {"limit": limit})


def measure(shape: Shape, *, num_tokens: int, peer_python: str, repeats: int) -> dict[str, Any]:
    """One shape of batches."""
    with tempfile.TemporaryDirectory() as scratch:
        num_rows = num_tokens // shape.seq_len
        write_rows(Path(scratch), shape, num_rows=num_rows)
        results = compare(Path(scratch), shape, peer_python=peer_python, repeats=repeats)
        parts = parts_us_per_batch(Path(scratch), shape, repeats=repeats)
    case = {"rows": num_rows, **asdict(shape), "results": results, "parts_us_per_batch": parts}
    return {**case, "goals": judge(results, parts)}


def show(content: Mapping[str, Any]) -> None:
    """Prints a result for people."""
    for title, case in content["cases"].items():
        print(f"{title}: {case['batch_rows']} rows of {case['seq_len']} tokens")
        for result in case["results"]:
            if "absent" in result:
                print(f"  {result['name']:<24} absent: {result['absent']}")
                continue
            ratio, speed = result["raydist_speed_ratio"], result["tokens_per_s"]
            print(
                f"  {result['name']:<24}{speed['median'] / 1e6:8.1f} Mtokens/s   raydist is "
                f"{ratio['median']:.2f} times as fast ({ratio['min']:.2f} to {ratio['max']:.2f})"
            )
        for part, microseconds in case["parts_us_per_batch"].items():
            print(f"    {microseconds:6.1f} us a batch: {part}")
        show_goals(case["goals"])
    print("resume")
    show_goals(content["resume"]["goals"])


def show_goals(goals: Mapping[str, Any]) -> None:
    """Prints what was reached of each."""
    for name, goal in goals.items():
        print(f"  {name}: {goal['reached']:.2f} (goal {goal['goal']}), {'met' if goal['met'] else 'missed'}")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1 << 25, help="of each data set, a multiple of 2**20")
    args = parser.parse_args()
    if args.tokens % (1 << 20) or args.tokens < LOCATED_TOKENS:
        parser.error(f"--tokens must be a multiple of 2**20, at least {LOCATED_TOKENS}")
    load_before = os.getloadavg()[0]
    cases = {
        title: measure(shape, num_tokens=args.tokens, peer_python=args.peer_python, repeats=args.repeats)
        for title, shape in SHAPES.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        times_ms = resume_ms(Path(scratch), repeats=args.repeats)
    first_batch_ms = statistics.median(times_ms)
    resume = {
        "row": RESUME_ROW,
        **asdict(RESUME_SHAPE),
        "first_batch_ms": times_ms,
        "goals": {
            "milliseconds to the first batch": _goal(
                first_batch_ms, RESUME_GOAL_MS, met=first_batch_ms < RESUME_GOAL_MS
            )
        },
    }
    content = {
        "command": f"python benchmarks/loader.py --peer-python PATH --repeats {args.repeats} --tokens {args.tokens}",
        "environment": environment("torch", "numpy"),
        "load_average": {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)},
        "num_shards": NUM_SHARDS,
        "threads_of_operators": 1,
        "cases": cases,
        "resume": resume,
    }
    show(content)
    print(f"written: {write_result('loader', content).name}")


if __name__ == "__main__":
    main()
