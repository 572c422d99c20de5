"""A small real dataset and recipes on it, shared by the tests of the loop."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from data_loaders.prepare import PrepareSettings, prepare
from data_loaders.sources import Fields
from raydist.config.load import Recipe, merge, parse_overrides, resolve
from raydist.tracking.jsonl import Curve, read_curve
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt

SEQ_LEN = 32


def write_dataset(folder: Path, *, prompt_chars: int = 0) -> str:
    """Bytes of the interpreter's json package; with ``prompt_chars`` the first part of each record carries no loss."""
    import json as json_package

    records = folder / "records.jsonl"
    with records.open("w") as stream:
        for path in sorted(Path(json_package.__file__).parent.glob("*.py")):
            text = path.read_text()
            for number, start in enumerate(range(0, len(text), 500)):
                piece = text[start : start + 500]
                cut = prompt_chars * (number % 3)
                stream.write(json.dumps({"prompt": piece[:cut], "text": piece[cut:]}) + "\n")
    fields = Fields(text="text", prompt="prompt" if prompt_chars else None)
    settings = PrepareSettings((str(records),), tokenizer="bytes", name="json", fields=fields, validation_fraction=0.15)
    prepare(settings, out=str(folder / "data"))
    return str(folder / "data")


def recipe_values(dataset: str, output_dir: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "name": "run",
        "output_dir": str(output_dir),
        "model": {"preset": "debug", "overrides": {"num_layers": 2, "width": 32, "hidden_width": 64}},
        "data": {
            "train": f"{dataset}/train",
            "validation": f"{dataset}/validation",
            "seq_len": SEQ_LEN,
            "cache_dir": str(output_dir / "cache"),
        },
        "objective": {"name": "set_block", "block_size_max": 8},
        "training": {
            "num_steps": 20,
            "batch_rows": 8,
            "microbatch_rows": 2,
            "log_every_steps": 1,
            "validate_every_steps": 10,
            "num_threads": 1,
            "optimizer": {"learning_rate": 3e-3},
        },
        "checkpoint": {"every_steps": 10},
        "tracking": {"mlflow_uri": "none", "system_metrics": False},
    }
    return merge(values, parse_overrides([f"{key}={value}" for key, value in changes.items()]))


def recipe_of(dataset: str, output_dir: Path, **changes: Any) -> Recipe:
    """A resolved recipe; changes are ``**{"training.num_steps": 3}``."""
    return resolve(recipe_values(dataset, output_dir, **changes), path="case.yaml")


def undisturbed_curves(recipe: Recipe) -> dict[str, Curve]:
    """Trains in this process to the end; the curves of the run."""
    run_dir = prepare_run_dir(recipe, resume=False)
    run_attempt(recipe, run_dir=run_dir)
    return read_curve(f"{run_dir}/metrics.jsonl")


def torchrun(num_workers: int, *arguments: str) -> list[str]:
    """The command that runs ``raydist`` in several local processes."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers),
        "-m", "raydist.cli.main", *arguments,
    ]  # fmt: skip


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
