"""Share of time spent on useful steps while workers are killed, against Young's optimum for the same costs.

A real run on a real Ray whose workers are sent SIGKILL at random times (exponential, of a given mean time between failures;
the clock runs only while steps are made). The interval between checkpoints is Young's: ``sqrt(2 * save_cost * mtbf)``, with the
save cost that a run without failures has shown. What Young's model then expects, for as many failures of the same restart cost,
is a wall-clock time of

    steps * step_s * (1 + save_s / interval_s) + failures * (restart_s + interval_s / 2)

and the goodput is ``steps * step_s`` divided by the wall-clock time. Everything is scaled down: failures every some ten
seconds, saves of some ten milliseconds, steps of about as much.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import environment, write_result

from raydist.config.load import Recipe, resolve
from raydist.runtime.cluster import connected
from raydist.runtime.trainer import train_on_ray
from raydist.tracking.jsonl import read_records
from raydist.training.hooks import Hook, RunFacts
from raydist.training.run_dir import prepare_run_dir

GOAL = 0.95
NUM_WORKERS = 2
LOG_EVERY_STEPS = 5
CALIBRATION_STEPS = 600


@dataclass
class Killer(Hook):
    """SIGKILL to a worker after random times of training; a driver's hook.

    Attributes:
        mtbf_s: mean seconds of training between two kills.
        seed: of the times.
        starts: the start step of each attempt.
        kills: times of the kills.
    """

    mtbf_s: float
    seed: int
    starts: list[int] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._timer: threading.Timer | None = None
        self._num_steps = 0

    def on_start(self, facts: RunFacts) -> None:
        """An attempt begins."""
        self.starts.append(facts.start_step)
        self._num_steps = facts.num_steps
        self._timer = None

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sets the clock when the attempt's first steps are done, and stops it when all are."""
        if step >= self._num_steps:
            self.end()
        elif self._timer is None:
            self._timer = threading.Timer(self._random.expovariate(1 / self.mtbf_s), self._kill)
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """No more kills."""
        if self._timer is not None:
            self._timer.cancel()

    def _kill(self) -> None:
        children = psutil.Process().children(recursive=True)
        workers = sorted(child.pid for child in children if "RayTrainWorker" in " ".join(child.cmdline()))
        if workers:
            self.kills.append(time.time())
            os.kill(workers[-1], signal.SIGKILL)


def recipe_of(folder: Path, name: str, *, num_steps: int, every_steps: int) -> Recipe:
    """A small model, two workers, and a log line every few steps."""
    values = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"preset": "debug"},
        "data": {"train": str(folder / "data/train"), "seq_len": 64, "cache_dir": str(folder / "cache")},
        "objective": {"name": "set_block", "block_size_max": 8},
        "training": {
            "num_steps": num_steps,
            "batch_rows": 4 * NUM_WORKERS,
            "microbatch_rows": 4,
            "log_every_steps": LOG_EVERY_STEPS,
            "num_threads": 1,
            "optimizer": {"learning_rate": 1e-3},
        },
        "checkpoint": {"every_steps": every_steps, "every_minutes": None},
        "tracking": {"mlflow_uri": "none", "system_metrics": False},
        "scaling": {"num_workers": NUM_WORKERS, "max_failures": -1},
    }
    return resolve(values, path="goodput.yaml")


def prepare(folder: Path) -> None:
    """A dataset."""
    import email as package

    from data_loaders.prepare import PrepareSettings
    from data_loaders.prepare import prepare as prepare_dataset

    source = str(Path(package.__file__).parent)
    settings = PrepareSettings((source,), tokenizer="bytes", name="email", include=("*.py",))
    prepare_dataset(settings, out=str(folder / "data"))


def train(recipe: Recipe, *hooks: Hook) -> list[dict[str, Any]]:
    """Trains to the end; returns the lines of ``metrics.jsonl``."""
    run_dir = prepare_run_dir(recipe, resume=False)
    train_on_ray(recipe, run_dir=run_dir, hooks=hooks)
    return list(read_records(f"{run_dir}/metrics.jsonl"))


def costs(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of a step, and the seconds that a save keeps the loop from the next one, of a run without failures."""
    step_s = statistics.median(line["step_s"] for line in lines[2:] if "step_s" in line)
    stalls = [line["checkpoint/wait_s"] + line["checkpoint/stage_s"] for line in lines if "checkpoint/stage_s" in line]
    held = [line["checkpoint/held_s"] for line in lines if "checkpoint/held_s" in line]
    return step_s, statistics.median(stalls[1:]) + statistics.median(held[1:])


def measure(folder: Path, *, mtbf_s: float, train_s: float, step_s: float, save_s: float, seed: int) -> dict[str, Any]:
    """One run under failures."""
    every_steps = max(1, round(math.sqrt(2 * save_s * mtbf_s) / step_s))
    num_steps = round(train_s / step_s)
    killer = Killer(mtbf_s, seed)
    name = f"mtbf-{mtbf_s:.1f}"
    lines = train(recipe_of(folder, name, num_steps=num_steps, every_steps=every_steps), killer)
    killer.end()
    logged = [line for line in lines if "loss" in line]
    attempts = [[line for line in logged if line["attempt"] == attempt] for attempt in range(1, len(killer.starts) + 1)]
    begins = [
        attempt[0]["time"] - (attempt[0]["step"] - start) * step_s
        for attempt, start in zip(attempts, killer.starts, strict=True)
        if attempt  # one that follows a kill behind the last step has none left to make
    ]
    kills = killer.kills[: len(begins) - 1]
    restarts = [begin - kill for begin, kill in zip(begins[1:], kills, strict=True)]
    wall_s = logged[-1]["time"] - begins[0]
    interval_s = every_steps * step_s
    restart_s = statistics.fmean(restarts) if restarts else 0.0
    useful_s = num_steps * step_s
    young_s = useful_s * (1 + save_s / interval_s) + len(kills) * (restart_s + interval_s / 2)
    return {
        "mtbf_s": mtbf_s,
        "steps": num_steps,
        "checkpoint_every_steps": every_steps,
        "failures": len(kills),
        "restart_s": [round(value, 2) for value in restarts],
        "wall_s": round(wall_s, 2),
        "goodput": round(useful_s / wall_s, 4),
        "goodput_young": round(useful_s / young_s, 4),
        "share_of_young": round(young_s / wall_s, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtbf", type=float, nargs="+", default=[15.0, 30.0], help="seconds")
    parser.add_argument("--failures", type=float, default=6.0, help="how many to expect: the steps take this many MTBF")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch, connected(address=None, min_cpus=NUM_WORKERS):
        folder = Path(scratch)
        prepare(folder)
        calibration = recipe_of(folder, "calm", num_steps=CALIBRATION_STEPS, every_steps=50)
        step_s, save_s = costs(train(calibration))
        runs = [
            measure(folder, mtbf_s=mtbf, train_s=args.failures * mtbf, step_s=step_s, save_s=save_s, seed=args.seed)
            for mtbf in args.mtbf
        ]
    result = {
        "step_s": round(step_s, 5),
        "save_s": round(save_s, 5),
        "runs": runs,
        "goal": f"share_of_young >= {GOAL}",
        "reached": all(run["share_of_young"] >= GOAL for run in runs),
        **environment("ray", "torch"),
    }
    path = write_result("goodput", result)
    for run in runs:
        print(
            f"MTBF {run['mtbf_s']:g} s: {run['failures']} failures, "
            f"goodput {run['goodput']:.3f}, Young's {run['goodput_young']:.3f}"
        )
    print(f"{'reached' if result['reached'] else 'missed'}: {result['goal']}; {path}")


if __name__ == "__main__":
    main()
