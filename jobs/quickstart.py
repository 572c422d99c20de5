"""The whole way in one go, with the commands it runs: real text -> shards -> training on Ray -> MLflow -> pulled and sampled.

`make quickstart` calls it. Everything it makes lies under runs/; run it again and finished stages are kept or redone fresh.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import sysconfig
import time

from raydist.cli.main import main as raydist
from raydist.cli.output import next_commands, say
from raydist.core.units import format_duration
from raydist.runtime.cluster import connected

DATASET = "runs/data/python-library"
RECIPE = "jobs/recipes/quickstart.yaml"
RUN_DIR = "runs/quickstart"
PULLED = "runs/pulled/quickstart"
TOKENIZER = "bytes"
LEFT_OUT = ["test/*", "tests/*", "*/test/*", "*/tests/*", "site-packages/*", "idlelib/*", "lib2to3/*", "ensurepip/*"]


def stage(title: str, *command: str) -> None:
    """Says what comes, shows the command, runs it, and ends everything if it fails."""
    say(f"\n== {title}\n$ raydist {shlex.join(command)}")
    started = time.monotonic()
    exit_code = raydist(command)
    if exit_code:
        sys.exit(exit_code)
    say(f"-- {format_duration(time.monotonic() - started)}")


def main() -> None:
    """Runs the five stages."""
    started = time.monotonic()
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    shutil.rmtree(PULLED, ignore_errors=True)
    library = sysconfig.get_paths()["stdlib"]
    excludes = [word for pattern in LEFT_OUT for word in ("--exclude", pattern)]
    with connected(address=None, min_cpus=2):  # each of the two would start a Ray of its own; one start is enough
        stage(
            "1 of 5  a token dataset from the interpreter's own library",
            *(
                "data",
                "prepare",
                library,
                "--out",
                DATASET,
                "--tokenizer",
                TOKENIZER,
                "--include",
                "*.py",
                *excludes,
                "--validation-fraction",
                "0.05",
            ),
        )
        stage("2 of 5  Set Block Decoding on two Ray Train workers, sharded by FSDP2", "train", RECIPE)
    stage("3 of 5  the run as MLflow has it", "runs", "list", "--experiment", "quickstart")
    stage("4 of 5  its artifacts, pulled and hash-verified", *("artifacts", "pull", "quickstart", "--to", PULLED))
    stage(
        "5 of 5  the pulled model: one token a forward, and blocks by entropy bound",
        *("sample", f"{PULLED}/model", "--compare", "--trace", f"{PULLED}/trace.png"),
    )
    say(f"\nall done in {format_duration(time.monotonic() - started)}")
    say(f"decoding trace  {PULLED}/pictures/trace.png  (also in the MLflow run)")
    say(f"loss curves     {PULLED}/pictures/curves.png (also in the MLflow run)")
    next_commands(
        [
            ("your own prompt", f"raydist sample {RUN_DIR} --prompt 'import ' --gamma 0.6"),
            ("train longer", f"raydist train {RECIPE} name=longer training.num_steps=5000"),
            ("for transformers", "raydist export quickstart --to hf-quickstart"),
        ]
    )


if __name__ == "__main__":
    main()
