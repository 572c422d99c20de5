"""Sweeps on a real cluster of two CPUs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors

from raydist.core.errors import CapacityError
from raydist.evaluation.sweep_records import final_value
from raydist.runtime.sweep import run_sweep
from raydist.tracking import server
from tests.runtime.sweeps import METRIC, Watcher, make_sweep

pytestmark = pytest.mark.ray

RATE = "training.optimizer.learning_rate"
_OF_RAY_ITSELF = {"_AutoscalingCoordinatorActor"}


def alive_actors() -> dict[str, str]:
    """Actor id -> class name."""
    here = ray.get_runtime_context().gcs_address  # other clusters may run on this machine
    alive = list_actors(address=here, filters=[("state", "=", "ALIVE")])
    return {actor.actor_id: actor.class_name for actor in alive if actor.class_name not in _OF_RAY_ITSELF}


@pytest.fixture
def others(ray_cluster: None) -> set[str]:
    """Actors of earlier tests on the same cluster."""
    return set(alive_actors())


def assert_nothing_left(*, others: set[str]) -> None:
    """No placement group, no actor of a trial, all CPUs free."""
    for _ in range(50):
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        actors = [name for actor, name in alive_actors().items() if actor not in others]
        free = ray.available_resources().get("CPU", 0.0) == ray.cluster_resources()["CPU"]
        if not groups and not actors and free:
            return
        time.sleep(0.2)
    pytest.fail(f"left behind: {groups}, {actors}, CPUs free: {free}")


def test_asha_stops_the_worst_frees_their_workers_and_leaves_nothing(
    others: set[str], dataset: str, tmp_path: Path
) -> None:
    """Six trials on room for two: the first are good, so that later ones are judged against them."""
    rates = [1e-2, 3e-3, 1e-6, 2e-6, 3e-6, 4e-6]
    sweep = make_sweep(
        tmp_path,
        dataset,
        space={RATE: rates},
        recipe={"tracking.mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db"},
        scheduler={"name": "asha", "grace_steps": 2, "reduction_factor": 2},
    )
    watcher = Watcher()
    outcome = run_sweep(sweep, resume=False, view=watcher, register="winner")
    assert watcher.at_once == watcher.most_running == int(ray.cluster_resources()["CPU"])
    assert sorted(watcher.ended) == [f"rates-{index:03d}" for index in range(6)]
    states = {record.name: record.state for record in outcome.records}
    assert set(states.values()) == {"finished", "stopped"}
    assert outcome.best is not None
    assert outcome.best.parameters[RATE] in rates[:2]
    stopped = [record for record in outcome.records if record.state == "stopped"]
    assert len(stopped) >= 3
    for record in stopped:
        assert record.num_steps < 8, "it trained on after its verdict"
        assert record.run_dir
        assert not os.path.exists(f"{record.run_dir}/export")
    assert os.path.exists(f"{outcome.best.run_dir}/export/model.safetensors")
    assert_nothing_left(others=others)
    check_mlflow(outcome, sweep.name)


def check_mlflow(outcome: Any, name: str) -> None:
    """One parent with table, space, pictures and the pointer; one complete child for each trial."""
    client = server.connect(outcome.parent.uri)
    parent = client.get_run(outcome.parent.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["raydist.best_trial"] == outcome.best.name
    assert parent.data.params["metric.0.name"] == METRIC
    files = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.yaml", "trials.jsonl", "ranking.json", "best.json", "pictures"} <= files
    pictures = {item.path for item in client.list_artifacts(parent.info.run_id, "pictures")}
    assert {"pictures/sweep.html", "pictures/parallel_coordinates.png", "pictures/marginals.png"} <= pictures
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    by_name = {child.info.run_name: child for child in children}
    assert sorted(by_name) == sorted(record.name for record in outcome.records)
    for record in outcome.records:
        child = by_name[record.name]
        assert child.info.status == "FINISHED"
        assert child.data.tags["raydist.trial_state"] == record.state
        assert child.data.metrics[METRIC] == pytest.approx(final_value(record, METRIC))
        points = client.get_metric_history(child.info.run_id, METRIC)
        assert [point.step for point in points] == [step for step, _ in record.curve[METRIC]]
    versions = client.search_model_versions("name = 'winner'")
    assert [version.run_id for version in versions] == [by_name[outcome.best.name].info.run_id]
    assert outcome.model_version == 1


def test_the_number_of_workers_does_not_change_a_metric_and_a_failed_trial_does_not_end_a_sweep(
    others: set[str], dataset: str, tmp_path: Path
) -> None:
    """Equal trials on one and two workers; a third one's loss is not a number."""
    one_worker, two_workers, half = {"num_workers": 1}, {"num_workers": 2}, {"cpus_per_worker": 0.5}
    diverging = {"choice": [1e30], "when": {"scaling.cpus_per_worker": 0.5}}
    sweep = make_sweep(
        tmp_path,
        dataset,
        space={"scaling": [one_worker, two_workers, half], RATE: diverging},
        recipe={"training.optimizer.clip_norm": "null"},
    )
    watcher = Watcher()
    outcome = run_sweep(sweep, resume=False, view=watcher)
    one, two, failed = sorted(outcome.records, key=lambda record: record.name)
    assert [record.state for record in (one, two, failed)] == ["finished", "finished", "failed"]
    assert [step for step, _ in one.curve[METRIC]] == [2, 4, 6, 8]
    for (_, left), (_, right) in zip(one.curve[METRIC], two.curve[METRIC], strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    assert "not a number" in outcome.failures[failed.name]
    assert outcome.records[-1].name == failed.name
    assert_nothing_left(others=others)
    again = run_sweep(sweep, resume=True, view=Watcher())
    lines = [json.loads(line) for line in Path(again.folder.file("trials.jsonl")).read_text().splitlines()]
    begun = [line["name"] for line in lines if line["state"] == "running"]
    assert begun == [one.name, two.name, failed.name, failed.name], "only what failed is tried again"


def test_a_sweep_that_no_node_can_hold_is_refused_with_the_numbers(
    others: set[str], dataset: str, tmp_path: Path
) -> None:
    sweep = make_sweep(
        tmp_path, dataset, space={RATE: [1e-3]}, recipe={"scaling.cpus_per_worker": 100, "training.num_steps": 8}
    )
    with pytest.raises(CapacityError, match="no trial fits") as caught:
        run_sweep(sweep, resume=False, view=Watcher())
    assert "1 workers of 100 CPU" in (caught.value.expected or "")
    assert not (tmp_path / "out" / "rates").exists(), "the name of a refused sweep must stay free"
