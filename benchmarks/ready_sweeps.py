"""How long each sweep of sweeps/ takes with `+debug`, as a user types it.

Text, the models that the sweeps over samplers need, and all runs are made in a scratch folder; the clock is that of the command
`raydist sweep` alone, from its start to its end, with Ray's own start and the embedded MLflow in it.

About four minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, environment, write_result

GOAL_S = 300.0
_FEWEST_TRIALS = 8
_RECIPES = "jobs/recipes/debug_cpu"


def raydist(*words: str) -> dict[str, Any]:
    """What a verb that must succeed says in its last line."""
    own = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, "-m", "raydist.cli.main", *words, "--json"],
        env={**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"raydist {' '.join(words)}\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def prepare(folder: Path) -> None:
    """The text of the debug recipes."""
    source = os.path.join(sysconfig.get_paths()["stdlib"], "email")
    settings = ("--tokenizer", "bytes", "--include", "*.py", "--validation-fraction", "0.2")
    raydist("data", "prepare", source, "--out", f"{folder}/data", *settings)


def words_for(path: Path, folder: Path) -> list[str]:
    """Where a sweep finds its text; the model of one over samplers is trained here, by the debug recipe of its name."""
    here = [f"output_dir={folder}/runs"]
    text = [f"data.train={folder}/data/train", f"data.validation={folder}/data/validation"]
    checkpoint = yaml.safe_load(path.read_text())["overlays"]["debug"].get("checkpoint")
    if checkpoint is None:
        return [*here, *text]
    recipe = checkpoint.removeprefix("debug-").replace("-", "_")
    raydist("train", f"{_RECIPES}/{recipe}.yaml", "--no-ray", *here, *text)
    return [*here, f"continuation.data={folder}/data/validation"]


def measure(path: Path, folder: Path) -> dict[str, Any]:
    """Wall-clock seconds, and how its trials ended."""
    words = words_for(path, folder)
    start = time.perf_counter()
    answer = raydist("sweep", str(path.relative_to(ROOT)), "+debug", *words)
    wall_s = time.perf_counter() - start
    states = Counter(trial["state"] for trial in answer["trials"])
    if len(answer["trials"]) < _FEWEST_TRIALS or set(states) - {"finished", "stopped"}:
        raise SystemExit(f"{path.name}: {dict(states)}")
    return {"wall_s": round(wall_s, 1), "trials": len(answer["trials"]), "states": dict(sorted(states.items()))}


def summary(sweeps: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All sweeps, and the goal for the slowest."""
    slowest = max(sweeps, key=lambda name: float(sweeps[name]["wall_s"]))
    reached = sweeps[slowest]["wall_s"]
    return {
        "what": "raydist sweep sweeps/NAME.yaml +debug, one after the other; the whole command, Ray's start included",
        "environment": environment("raydist", "ray", "torch", "mlflow"),
        "sweeps": sweeps,
        "goals": {
            "seconds of the slowest ready sweep with +debug": {
                "goal": GOAL_S,
                "reached": reached,
                "sweep": slowest,
                "met": reached <= GOAL_S,
            }
        },
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    sweeps: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for path in sorted((ROOT / "sweeps").glob("*.yaml")):
            sweeps[path.stem] = measure(path, Path(name))
            print(path.stem, json.dumps(sweeps[path.stem]), flush=True)
    result = summary(sweeps)
    print(json.dumps(result, indent=2))
    write_result("ready_sweeps", result)


if __name__ == "__main__":
    main()
