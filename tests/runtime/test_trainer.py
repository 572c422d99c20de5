"""Ray Train around the loop: the same numbers as without it, progress, and what reaches the user when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raydist.config.schema import ScalingConfig
from raydist.core.errors import CapacityError, ConfigError, DataError
from raydist.runtime import trainer
from raydist.runtime.cluster import connected, require_capacity
from raydist.runtime.trainer import train_on_ray
from raydist.tracking.jsonl import read_curve
from raydist.training.hooks import Hook, RunFacts
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from tests.servers.processes import wait_until
from tests.training.cases import recipe_of

pytestmark = pytest.mark.ray


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
    changes = {"training.num_steps": 8, "training.validate_every_steps": 8, "checkpoint.every_steps": 4}
    on_ray = recipe_of(dataset, tmp_path / "ray", **changes, **{"scaling.num_workers": 2})
    alone = recipe_of(dataset, tmp_path / "alone", **changes)
    run_dir = prepare_run_dir(on_ray, resume=False)
    recorder = Recorder()
    outcome = train_on_ray(on_ray, run_dir=run_dir, hooks=[recorder])
    alone_dir = prepare_run_dir(alone, resume=False)
    run_attempt(alone, run_dir=alone_dir)
    curve, reference = (dict(read_curve(f"{folder}/metrics.jsonl")["loss"]) for folder in (run_dir, alone_dir))
    assert list(curve) == list(range(1, 9))
    assert curve == pytest.approx(reference, rel=1e-6)
    assert outcome.step == 8
    assert outcome.metrics["loss"] == pytest.approx(reference[8], rel=1e-6)
    assert [facts.world_size for facts in recorder.facts] == [2]
    assert recorder.steps == list(range(1, 9))
    assert recorder.checkpoints == [4, 8]
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
    elastic = recipe_of(dataset, tmp_path, **{"scaling.num_workers": 4, "scaling.min_workers": 1})
    require_capacity(elastic.config.scaling)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port"])
def test_nobody_at_the_address(address: str) -> None:
    """In a process of its own: a Ray that is already connected is used as it is."""
    code = f"from raydist.runtime.cluster import connected\nwith connected(address={address!r}): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigError: no Ray cluster answers" in done.stderr, done.stderr[-2000:]


def test_an_existing_connection_is_kept(ray_cluster: None) -> None:
    import ray

    with connected(address=None):
        assert ray.is_initialized()
    assert ray.is_initialized()


def test_a_run_that_waits_for_a_busy_cluster_says_so(
    ray_cluster: None, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    monkeypatch.setattr(trainer, "_ROOM_PATIENCE_S", 1.0)
    cpus = int(ray.cluster_resources()["CPU"])
    busy = placement_group([{"CPU": 1.0}] * (cpus - 1))
    assert busy.wait(30)
    recipe = recipe_of(dataset, tmp_path, **{"training.num_steps": 2, "scaling.num_workers": 2})

    def free_later() -> None:
        wait_until(lambda: "waits for room" in caplog.text, timeout_s=60, what="the run says that it waits")
        remove_placement_group(busy)

    with caplog.at_level("WARNING", logger="raydist"), ThreadPoolExecutor() as pool:
        freed = pool.submit(free_later)
        outcome = train_on_ray(recipe, run_dir=prepare_run_dir(recipe, resume=False))
        freed.result()
    assert outcome.step == 2
    assert caplog.text.count(f"the run waits for room in the Ray cluster: it needs 2 CPU of {cpus}; free: 1 CPU") == 1


def test_a_wait_is_told_once_and_a_full_cluster_alone_is_none(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    monkeypatch.setattr(trainer, "_ROOM_PATIENCE_S", 0.0)
    cpus = int(ray.cluster_resources()["CPU"])
    facts = RunFacts(name="run", num_steps=9, start_step=0, num_parameters=1, tokens_per_step=8, world_size=cpus)

    def words_of(watch: trainer._RoomWatch) -> list[str]:
        caplog.clear()
        for _ in range(3):
            watch.look()
        return list(caplog.messages)

    def needs(num_cpus: int) -> str:
        return f"the run waits for room in the Ray cluster: it needs {num_cpus} CPU of {cpus}; free: 0 CPU"

    watch, larger = (trainer._RoomWatch(ScalingConfig(num_workers=count)) for count in (cpus, cpus + 1))
    own = placement_group([{"CPU": 1.0}] * cpus)
    assert own.wait(30)
    wait_until(lambda: not ray.available_resources().get("CPU"), timeout_s=30, what="Ray counts them as taken")
    with caplog.at_level("WARNING", logger="raydist"):
        assert words_of(watch) == []
        assert words_of(larger) == [needs(cpus + 1)], "a node is missing"
        waiting = placement_group([{"CPU": 1.0}])
        assert words_of(watch) == [needs(cpus)]
        assert words_of(watch) == []
        watch.on_start(facts)
        assert words_of(watch) == [needs(cpus)]
    for group in (own, waiting):
        remove_placement_group(group)
