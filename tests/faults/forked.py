"""Attempts in processes of their own, forked from a server that has imported everything, so that each costs no import."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from raydist.config.load import Recipe
from raydist.config.schema import RunConfig
from raydist.training.session import run_attempt
from tests.faults.save_points import arm

_context = multiprocessing.get_context("forkserver")


def start(function: Callable[..., None], *args: Any) -> Any:
    """Starts ``function(*args)`` in a new process; the caller joins it."""
    _context.set_forkserver_preload(["tests.faults.forked"])
    process = _context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def attempt(values: dict[str, Any], config_hash: str, run_dir: str, point: str, step: int) -> None:
    """One attempt that is killed when the save of ``step`` passes ``point``."""
    arm(point, step=step)
    run_attempt(Recipe(RunConfig.model_validate(values), config_hash, "case.yaml"), run_dir=run_dir)
