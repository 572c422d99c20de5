"""A step of our Discrete Flow Matching sampler against flow-matching's ``MixtureDiscreteEulerSolver``.

    python benchmarks/samplers.py [--steps 16] [--repeats 5]

V = 32,768, L = 256, B = 8, float32 logits, one thread, a process each. Both run the whole chain from the source to data in the
same number of steps, on the same model stub: a table of fixed logits, one row for each position. The peer's solver asks its
model for probabilities of all positions, so that its stub is a softmax of that table; in the case ``probabilities free`` the
softmax was done before, and the peer's time is the solver's alone.

The noise of ours belongs to the prompts (philox keyed by prompt, purpose and step) and is part of the time. Memory is what the
peak of the process's resident memory grows by in the first run, after the stub was made and touched.

A ratio is taken of two measurements made one right after the other, and the median of these ratios is the result. It goes to
``benchmarks/results/samplers.json``. How far both draw from the same law is tested in ``tests/sampling/``, not here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import Contender, Ratio, environment, write_result

SIZE = {"vocab_size": 32_768, "length": 256, "batch_rows": 8}
GOALS = {"time": 5.0, "memory": 1 / 3}
CASES = [
    {"source": "mask", "corrector": 0.0, "probabilities": "computed"},
    {"source": "mask", "corrector": 0.0, "probabilities": "free"},
    {"source": "uniform", "corrector": 0.0, "probabilities": "computed"},
    {"source": "uniform", "corrector": 1.0, "probabilities": "computed"},
]


def case_name(case: dict[str, Any]) -> str:
    corrector = f", corrector {case['corrector']:g}" if case["corrector"] else ""
    return f"{case['source']} source{corrector}, probabilities {case['probabilities']}"


def measure(case: dict[str, Any], *, num_steps: int, repeats: int) -> dict[str, Any]:
    """Both contenders, who goes first changing with each repeat; the first run of each gives the memory."""
    script = Path(__file__).parent / "sampler_contenders.py"
    spec = {**SIZE, **case, "num_steps": num_steps}
    contenders = {kind: Contender(script, {**spec, "contender": kind}) for kind in ("raydist", "flow_matching")}
    peak_bytes = {kind: contender.ask()["peak_growth_bytes"] for kind, contender in contenders.items()}
    answers: dict[str, list[dict[str, float]]] = {kind: [] for kind in contenders}
    for repeat in range(repeats):
        for kind in list(contenders) if repeat % 2 == 0 else reversed(list(contenders)):
            answers[kind].append(contenders[kind].ask())
    for contender in contenders.values():
        contender.close()
    ours, theirs = answers["raydist"], answers["flow_matching"]
    ratios = {
        name: Ratio([answer[key] for answer in theirs], [answer[key] for answer in ours])
        for name, key in (("time_ratio", "seconds"), ("cpu_time_ratio", "cpu_seconds"))
    }
    memory_ratio = peak_bytes["raydist"] / peak_bytes["flow_matching"]
    met = ratios["time_ratio"].median >= GOALS["time"] and memory_ratio <= GOALS["memory"]
    return {
        "case": case_name(case),
        **{name: ratio.as_json() for name, ratio in ratios.items()},
        "memory_ratio": round(memory_ratio, 4),
        "peak_growth_bytes": peak_bytes,
        "verdict": "met" if met else "missed",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="of the chain (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results = []
    for case in CASES:
        result = measure(case, num_steps=args.steps, repeats=args.repeats)
        results.append(result)
        time_ratio = result["time_ratio"]
        print(
            f"{result['case']:<60} flow-matching / raydist, time {time_ratio['median']:7.1f} "
            f"({time_ratio['min']:.1f} .. {time_ratio['max']:.1f}); raydist / flow-matching, memory "
            f"{result['memory_ratio']:.3f}  {result['verdict']}",
            flush=True,
        )
    path = write_result(
        "samplers",
        {
            "command": f"python benchmarks/samplers.py --steps {args.steps} --repeats {args.repeats}",
            "threads": 1,
            "dtype": "float32",
            **SIZE,
            "num_steps": args.steps,
            "environment": environment("torch", "flow-matching"),
            "goals": {"time": ">= 5, flow-matching / raydist", "memory": "<= 1/3, raydist / flow-matching"},
            "results": results,
        },
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
