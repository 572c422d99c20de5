"""Ray Train around the loop: the same numbers as without it, progress, and what reaches the user when it fails."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from raydist.core.errors import CapacityError, ConfigError, DataError
from raydist.runtime.cluster import connected, require_capacity
from raydist.runtime.trainer import train_on_ray
from raydist.tracking.jsonl import read_curve
from raydist.training.hooks import Hook, RunFacts
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from tests.training.cases import recipe_of

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


class Recorder(Hook):
    def __init__(self) -> None:
        self.facts: list[RunFacts] = []
        self.steps: list[int] = []
        self.checkpoints: list[int] = []

    def on_start(self, facts: RunFacts) -> None:
        self.facts.append(facts)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def on_checkpoint(self, step: int) -> None:
        self.checkpoints.append(step)


def test_two_ray_workers_compute_what_one_process_computes(ray_cluster: None, dataset: str, tmp_path: Path) -> None:
    on_ray = recipe_of(dataset, tmp_path / "ray", **{"scaling.num_workers": 2})
    alone = recipe_of(dataset, tmp_path / "alone")
    run_dir = prepare_run_dir(on_ray, resume=False)
    recorder = Recorder()
    outcome = train_on_ray(on_ray, run_dir=run_dir, hooks=[recorder])
    alone_dir = prepare_run_dir(alone, resume=False)
    run_attempt(alone, run_dir=alone_dir)
    curve, reference = (dict(read_curve(f"{folder}/metrics.jsonl")["loss"]) for folder in (run_dir, alone_dir))
    assert list(curve) == list(range(1, 21))
    assert curve == pytest.approx(reference, rel=1e-6)
    assert outcome.step == 20
    assert outcome.metrics["loss"] == pytest.approx(reference[20], rel=1e-6)
    assert [facts.world_size for facts in recorder.facts] == [2]
    assert recorder.steps == list(range(1, 21))
    assert recorder.checkpoints == [10, 20]
    assert os.path.exists(f"{run_dir}/export/model.safetensors")


def test_a_mistake_met_by_a_worker_reaches_the_user_as_it_is(ray_cluster: None, dataset: str, tmp_path: Path) -> None:
    """Ray would restart the workers up to three times; a mistake must come back after one."""
    recipe = recipe_of(dataset, tmp_path, **{"data.seq_len": 50_000, "training.validate_every_steps": "null"})
    recorder = Recorder()
    with pytest.raises((DataError, ConfigError)) as caught:
        train_on_ray(recipe, run_dir=prepare_run_dir(recipe, resume=False), hooks=[recorder])
    assert caught.value.fix
    assert recorder.facts == []


def test_a_run_that_never_fits_is_refused(ray_cluster: None, dataset: str, tmp_path: Path) -> None:
    recipe = recipe_of(dataset, tmp_path, **{"scaling.num_workers": 4, "scaling.cpus_per_worker": 1000})
    with pytest.raises(CapacityError, match="too small") as caught:
        require_capacity(recipe.config.scaling)
    assert "4000 CPU" in (caught.value.expected or "")


def test_nobody_at_the_address() -> None:
    """In a process of its own: a Ray that is already connected is used as it is."""
    import subprocess
    import sys

    code = (
        "from raydist.runtime.cluster import connected\n"
        "with connected(address='127.0.0.1:1'):\n"
        "    raise SystemExit('connected')\n"
    )
    environment = {
        **os.environ,
        "RAY_gcs_server_request_timeout_seconds": "2",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "2",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "ConfigError: no Ray cluster answers" in done.stderr, done.stderr[-2000:]


def test_an_existing_connection_is_kept(ray_cluster: None) -> None:
    import ray

    with connected(address=None):
        assert ray.is_initialized()
    assert ray.is_initialized()
