"""A small run configuration, and what a server has of a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydist.config.schema import RunConfig


def make_config(output_dir: Path, **tracking: Any) -> RunConfig:
    """A valid configuration whose tracking section is given."""
    return RunConfig.model_validate(
        {
            "name": "small",
            "output_dir": str(output_dir),
            "model": {},
            "data": {"train": "data/text", "seq_len": 8},
            "objective": {"name": "next_token"},
            "training": {
                "num_steps": 1,
                "batch_rows": 1,
                "microbatch_rows": 1,
                "optimizer": {"learning_rate": 1e-3},
            },
            "tracking": tracking,
        }
    )


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Everything the server has of a metric, in the order of steps."""
    from raydist.tracking.server import connect

    return sorted((metric.step, metric.value) for metric in connect(uri).get_metric_history(run_id, key))
