"""What a trial costs beside its steps: `raydist sweep`, `raydist train` in a loop, and bare Ray Tune with an empty function.

Equal, tiny trials, so that nothing but starting and ending them is measured. Each way runs in fresh processes, Ray's own start
included, and reports wall-clock time divided by the number of trials; the steps themselves are measured with --no-ray and
their time is in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import environment, write_result

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
    """The recipe, and a sweep whose trials differ in a limit that none of them comes near."""
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
        "space": {"scaling.collective_timeout_s": [1800.0 + trial for trial in range(trials)]},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    raydist = [sys.executable, "-m", "raydist.cli.main"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        write_files(folder, trials=args.trials, steps=args.steps)
        bare = _BARE.format(cpus=os.cpu_count(), folder=str(folder / "tune"), trials=args.trials)
        bare_s = seconds([sys.executable, "-c", bare])
        sweep_s = seconds([*raydist, "sweep", str(folder / "sweep.yaml")])
        recipe = str(folder / "recipe.yaml")
        loop_s = sum(seconds([*raydist, "train", recipe, f"name=loop-{trial}"]) for trial in range(args.trials))
        seconds([*raydist, "train", recipe, "name=alone", "--no-ray"])
        records = (folder / "runs/alone/metrics.jsonl").read_text().splitlines()
        step_s = next(json.loads(line)["step_s"] for line in records if "step_s" in line)
    write_result("sweep_overhead", summary(args, bare_s=bare_s, sweep_s=sweep_s, loop_s=loop_s, step_s=step_s))


def summary(args: argparse.Namespace, *, bare_s: float, sweep_s: float, loop_s: float, step_s: float) -> dict[str, Any]:
    """Per trial, and the goal."""
    per_trial = {"bare_tune": bare_s, "raydist_sweep": sweep_s, "raydist_train_in_a_loop": loop_s}
    rounded = {name: round(value / args.trials, 2) for name, value in per_trial.items()}
    above_s = round((sweep_s - bare_s) / args.trials - args.steps * step_s, 2)
    print(rounded, f"sweep above bare Tune {above_s} s a trial, goal {GOAL_S}")
    return {
        "what": f"{args.trials} equal trials of {args.steps} steps, one worker each, Ray's start included",
        "environment": environment("ray", "torch"),
        "wall_s_per_trial": rounded,
        "steps_s_per_trial": round(args.steps * step_s, 2),
        "goals": {
            "seconds of a trial above bare Ray Tune, without its steps": {
                "goal": GOAL_S,
                "reached": above_s,
                "met": above_s <= GOAL_S,
            }
        },
    }


if __name__ == "__main__":
    main()
