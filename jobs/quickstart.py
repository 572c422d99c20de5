"""The whole way in one go, with the commands it runs: real text -> shards -> training on Ray -> MLflow -> pulled and sampled.

`make quickstart` calls it. Everything it makes lies under runs/; run it again and finished data is kept, the rest redone
fresh. After a change of the interpreter, whose library is the data, `raydist data prepare` refuses: `make clean` comes first.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import time

from raydist.cli.main import main as raydist
from raydist.cli.output import next_commands, say
from raydist.core.units import format_duration
from raydist.runtime.cluster import connected

RECIPE = "jobs/recipes/quickstart.yaml"
RUN_DIR = "runs/quickstart"
PULLED = "runs/pulled/quickstart"
# Two datasets that the recipe mixes: the code with its documentation, and the character tables beside it.
CODE, TABLES = "runs/data/python-code", "runs/data/python-tables"
NOT_CODE = ["test/*", "tests/*", "*/test/*", "*/tests/*", "site-packages/*", "idlelib/*", "lib2to3/*", "encodings/*"]


def stage(title: str, *command: str) -> None:
    """Says what comes, shows the command, runs it, and ends everything if it fails."""
    say(f"\n== {title}\n$ raydist {shlex.join(command)}")
    started = time.monotonic()
    exit_code = raydist(command)
    if exit_code:
        sys.exit(exit_code)
    say(f"-- {format_duration(time.monotonic() - started)}")


def commands(library: str) -> list[tuple[str, list[str]]]:
    """The stages in their order: a title, and the words behind `raydist`."""
    how = ["--tokenizer", "bytes", "--include", "*.py", "--validation-fraction", "0.05"]
    tables = os.path.join(library, "encodings")
    sample = ["sample", f"{PULLED}/model", "--compare", "--trace", f"{PULLED}/trace.png"]
    return [
        (
            "1 of 5  the interpreter's library",
            ["data", "prepare", library, "--out", CODE, *how, "--exclude", *NOT_CODE],
        ),
        ("1 of 5  its character tables", ["data", "prepare", tables, "--out", TABLES, *how]),
        ("2 of 5  Set Block Decoding on two Ray Train workers, sharded by FSDP2", ["train", RECIPE]),
        ("3 of 5  the run as MLflow has it", ["runs", "list", "--experiment", "quickstart"]),
        ("4 of 5  its artifacts, pulled and hash-verified", ["artifacts", "pull", "quickstart", "--to", PULLED]),
        ("5 of 5  the pulled model: one token a forward, and blocks by entropy bound", sample),
    ]


def main() -> None:
    """Runs the five stages."""
    started = time.monotonic()
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    shutil.rmtree(PULLED, ignore_errors=True)
    stages = commands(sysconfig.get_paths()["stdlib"])
    with connected(address=None, min_cpus=2):  # each stage would start a Ray of its own; one start is enough
        for title, words in stages[:3]:
            stage(title, *words)
    for title, words in stages[3:]:
        stage(title, *words)
    say(f"\nall done in {format_duration(time.monotonic() - started)}")
    say(f"decoding trace  {PULLED}/pictures/trace.png  (also in the MLflow run)")
    say(f"loss curves     {PULLED}/pictures/curves.png (also in the MLflow run)")
    next_commands(
        [
            ("your own prompt", f"raydist sample {RUN_DIR} --prompt '#  LATIN SMALL' --gamma 0.6"),
            ("train longer", f"raydist train {RECIPE} name=longer training.num_steps=5000"),
            ("for transformers", "raydist export quickstart --to hf-quickstart"),
        ]
    )


if __name__ == "__main__":
    main()
