"""What a trial costs beside its steps: `raydist sweep`, `raydist train` in a loop, and bare Ray Tune with an empty function.

Nearly equal, tiny trials, so that little but starting and ending them is measured. Each way runs in fresh processes, Ray's own
start included, and reports wall-clock time divided by the number of trials; bare Tune and the sweep take turns. Where the time
of a trial goes is in trials.jsonl; the first trial of each slot starts the processes that the others use.

About six minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from common import environment, write_result

from raydist.runtime.trial_stages import STAGES

GOAL_S = 2.0
_BARE = """
import json, ray
from ray import tune
ray.init(address="local", num_cpus={cpus}, log_to_driver=False, logging_level="ERROR")
run_config = tune.RunConfig(storage_path={folder!r}, verbose=0)
space = {{"trial": tune.grid_search(list(range({trials})))}}
tune.Tuner(tune.with_resources(lambda config: None, {{"CPU": 1}}), param_space=space, run_config=run_config).fit()
"""


def prepare(folder: Path) -> None:
    """Data, recipe and sweep."""
    import email as package

    from data_loaders.prepare import PrepareSettings
    from data_loaders.prepare import prepare as prepare_dataset

    source = str(Path(package.__file__).parent)
    settings = PrepareSettings((source,), tokenizer="bytes", name="email", include=("*.py",), validation_fraction=0.3)
    prepare_dataset(settings, out=str(folder / "data"))


def write_files(folder: Path, *, trials: int, steps: int) -> None:
    """The recipe, and a sweep whose trials hardly differ."""
    recipe = {
        "output_dir": str(folder / "runs"),
        "model": {"preset": "debug"},
        "data": {"train": str(folder / "data/train"), "validation": str(folder / "data/validation"), "seq_len": 64},
        "objective": {"name": "set_block", "block_size_max": 8},
        "training": {
            "num_steps": steps,
            "batch_rows": 4,
            "microbatch_rows": 4,
            "validate_every_steps": steps,
            "num_threads": 1,
            "optimizer": {"learning_rate": 1e-3},
        },
        "checkpoint": {"every_steps": steps},
        "tracking": {"mlflow_uri": "none", "system_metrics": False},
    }
    sweep = {
        "name": "overhead",
        "recipe": str(folder / "recipe.yaml"),
        "space": {"training.optimizer.learning_rate": [1e-3 + 1e-6 * trial for trial in range(trials)]},
        "metric": "validation/loss/ntp",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))


def seconds(command: list[str]) -> float:
    """Wall-clock time of a process that must succeed."""
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return time.perf_counter() - start


def stages(lines: Sequence[Mapping[str, Any]], *, slots: int) -> dict[str, dict[str, float]]:
    """The median seconds of each stage, of the first trial of each slot and of those that follow."""
    ended = [line["stages_s"] for line in lines if line["state"] == "finished"]
    ended.sort(key=lambda stages_s: -stages_s["workers"])
    return {
        who: {stage: round(statistics.median(trial[stage] for trial in trials), 3) for stage in STAGES}
        for who, trials in (("first", ended[:slots]), ("following", ended[slots:]))
    }


def step_seconds(folder: Path) -> float:
    """Of one step, from a run without Ray."""
    records = (folder / "runs/alone/metrics.jsonl").read_text().splitlines()
    return float(next(json.loads(line)["step_s"] for line in records if "step_s" in line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loop-trials", type=int, default=3, help="how many of them plain `raydist train` runs")
    args = parser.parse_args()
    raydist = [sys.executable, "-m", "raydist.cli.main"]
    bare_s, sweep_s, lines = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        write_files(folder, trials=args.trials, steps=args.steps)
        for repeat in range(args.repeats):
            bare = _BARE.format(cpus=os.cpu_count(), folder=str(folder / f"tune-{repeat}"), trials=args.trials)
            bare_s.append(seconds([sys.executable, "-c", bare]) / args.trials)
            command = [*raydist, "sweep", str(folder / "sweep.yaml"), f"name=overhead-{repeat}"]
            sweep_s.append(seconds(command) / args.trials)
            written = (folder / f"runs/overhead-{repeat}/trials.jsonl").read_text().splitlines()
            lines.append([json.loads(line) for line in written])
        recipe = str(folder / "recipe.yaml")
        loop_s = [seconds([*raydist, "train", recipe, f"name=loop-{trial}"]) for trial in range(args.loop_trials)]
        seconds([*raydist, "train", recipe, "name=alone", "--no-ray"])
        steps_s = args.steps * step_seconds(folder)
    middle = sorted(range(args.repeats), key=lambda repeat: sweep_s[repeat])[args.repeats // 2]
    result = summary(args, bare_s=bare_s, sweep_s=sweep_s, loop_s=loop_s, steps_s=steps_s)
    result["stages_s"] = stages(lines[middle], slots=os.cpu_count() or 1)
    print(json.dumps(result, indent=2))
    write_result("sweep_overhead", result)


def summary(
    args: argparse.Namespace,
    *,
    bare_s: Sequence[float],
    sweep_s: Sequence[float],
    loop_s: Sequence[float],
    steps_s: float,
) -> dict[str, Any]:
    """Per trial, and the goal."""
    per_trial = {"bare_tune": bare_s, "raydist_sweep": sweep_s, "raydist_train_in_a_loop": loop_s}
    own_steps_s = steps_s / (os.cpu_count() or 1)  # as the wall-clock time: trials run side by side
    above_s = [sweep - bare - own_steps_s for sweep, bare in zip(sweep_s, bare_s, strict=True)]
    median_s = round(statistics.median(above_s), 2)
    return {
        "what": f"{args.trials} trials of {args.steps} steps, one worker each, Ray's start included; "
        f"medians of {args.repeats} repeats",
        "environment": environment("ray", "torch"),
        "wall_s_per_trial": {name: round(statistics.median(values), 2) for name, values in per_trial.items()},
        "steps_s_per_trial": round(steps_s, 2),
        "goals": {
            "seconds of a trial above bare Ray Tune, without its steps": {
                "goal": GOAL_S,
                "reached": median_s,
                "all": [round(value, 2) for value in above_s],
                "met": median_s <= GOAL_S,
            }
        },
    }


if __name__ == "__main__":
    main()
