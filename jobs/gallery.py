"""One small run per objective on the same text, and of each sampler a picture and an animation of a decoding.

    python jobs/gallery.py [--num-steps 600] [--out docs/pictures/samplers] [--only NAME ...]

The runs lie under runs/gallery, in one process each without Ray; about two minutes a recipe on two cores. The recipes are
those of jobs/recipes/debug_cpu, on the quickstart's character tables, with a larger model and more steps.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence

from raydist.cli.main import main as raydist
from raydist.cli.output import say

TABLES = "runs/data/python-tables"
PROMPT = "    0x0041: 0x0041,     #  LATIN CAPITAL LETTER A\n"
# recipe -> the samplers that its model is decoded with, each with its settings
SAMPLERS: dict[str, list[list[str]]] = {
    "next_token": [["autoregressive"], ["byte_level"]],
    "set_block": [["set_block", "block_size=8"]],
    "block": [["block"]],
    "masked": [["masked", "block_size=8", "temperature=0.7"]],
    "discrete_flow": [["discrete_flow", "num_steps=64", "temperature=0.5"]],
    "resample": [["resample", "confidence_threshold=0.5"]],
    "edit_flow": [["edit_flow", "num_steps=128", "temperature=0.5"]],
}


def run(*command: str) -> None:
    """Shows a command, runs it, and ends everything if it fails."""
    say(f"\n$ raydist {shlex.join(command)}")
    exit_code = raydist(command)
    if exit_code:
        sys.exit(exit_code)


def train(recipe: str, *, num_steps: int) -> str:
    """Trains a recipe anew; returns the run directory."""
    name = f"gallery-{recipe}"
    shutil.rmtree(f"runs/gallery/{name}", ignore_errors=True)
    settings = {
        "name": name,
        "output_dir": "runs/gallery",
        "model.preset": "tiny-1m",
        "data.train": f"{TABLES}/train",
        "data.validation": f"{TABLES}/validation",
        "data.seq_len": 128,
        "training.num_steps": num_steps,
        "training.validate_every_steps": num_steps,
        "training.log_every_steps": 50,
        "training.optimizer.learning_rate": 6.0e-3,
        "training.learning_rate_schedule.warmup_steps": 50,
        "training.learning_rate_schedule.final_factor": 0.02,
        "checkpoint.every_steps": num_steps,
        "tracking.mlflow_uri": "none",
        "sampling.prompts": "[]",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    run("train", f"jobs/recipes/debug_cpu/{recipe}.yaml", "--no-ray", *overrides)
    return f"runs/gallery/{name}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--out", default="docs/pictures/samplers")
    parser.add_argument("--only", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS), metavar="NAME")
    args = parser.parse_args(arguments)
    encodings = os.path.join(sysconfig.get_paths()["stdlib"], "encodings")
    run("data", "prepare", encodings, "--out", TABLES, "--tokenizer", "bytes", "--include", "*.py",
        "--validation-fraction", "0.05")  # fmt: skip
    for recipe in args.only:
        run_dir = train(recipe, num_steps=args.num_steps)
        for sampler in SAMPLERS[recipe]:
            for ending in ("png", "html"):
                run("sample", run_dir, "--prompt", PROMPT, "--max-new-tokens", "128", "--sampler", *sampler,
                    "--trace", f"{args.out}/{sampler[0]}.{ending}")  # fmt: skip


if __name__ == "__main__":
    main()
