"""Sweeps on a real cluster of two CPUs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.util import placement_group, placement_group_table, remove_placement_group

from raydist.checkpoint.layout import newest_complete, read_checkpoint
from raydist.core import storage
from raydist.core.errors import CapacityError
from raydist.evaluation.sweep_records import TrialRecord, final_value
from raydist.runtime.ray_internals import ENVIRONMENT, InProcessTrainer, spare_workers
from raydist.runtime.sweep import run_sweep
from raydist.runtime.trial_stages import STAGES
from raydist.tracking import server
from raydist.tracking.artifacts import CHECKPOINTS, read_manifest
from raydist.tracking.find import find_run
from raydist.tracking.jsonl import read_curve
from raydist.training.driver import checkpoint_files
from raydist.training.lease import LEASE
from tests.runtime.sweeps import METRIC, RATE, Watcher, actors, assert_nothing_left, lines, make_sweep

pytestmark = pytest.mark.ray


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
    before = set(actors(alive=False))
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
    made = [name for actor, name in actors(alive=False).items() if actor not in before]
    assert made.count("RayTrainWorker") == watcher.at_once, "trials did not go on in the workers of those before"
    stages = [set(entry.stages_s) for entry in outcome.folder.trials if entry.state == "finished"]
    assert stages
    assert all(names == set(STAGES) for names in stages)
    check_mlflow(outcome, sweep.name)
    check_pointer(outcome)


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


def check_pointer(outcome: Any) -> None:
    """``best.json`` names a checkpoint that is there; the sweep and finished trials point to theirs as trained runs do."""
    pointer = json.loads(Path(outcome.folder.file("best.json")).read_text())["checkpoint"]
    assert (pointer["step"], os.path.dirname(pointer["path"])) == (8, f"{outcome.best.run_dir}/checkpoints")
    assert read_checkpoint(pointer["path"]).step == 8
    assert pointer["sha256"] == storage.sha256(f"{pointer['path']}/complete.json")
    assert pointer["size"] == sum(os.path.getsize(file["uri"]) for file in pointer["files"])
    assert all(storage.sha256(file["uri"]) == file["sha256"] for file in pointer["files"])
    client = server.connect(outcome.parent.uri)
    assert client.get_run(outcome.parent.run_id).data.tags["raydist.best_checkpoint"] == pointer["path"]
    saved = {outcome.parent.run_id: newest_complete(outcome.best.run_dir)}
    for record in outcome.records:
        newest = newest_complete(record.run_dir) if record.state == "finished" else None
        saved[find_run(record.run_dir).run_id] = newest
    for run_id, newest in saved.items():
        files = [file for file in read_manifest(client, run_id) if file.name.startswith(f"{CHECKPOINTS}/")]
        assert files == ([] if newest is None else checkpoint_files(newest))
    assert pointer["files"] == [asdict(file) for file in checkpoint_files(read_checkpoint(pointer["path"]))]


def test_the_number_of_workers_does_not_change_a_metric_and_a_failed_trial_does_not_end_a_sweep(
    others: set[str], dataset: str, tmp_path: Path
) -> None:
    """Equal trials on one and two workers; a third one's loss is not a number before it was measured.

    After a restart one that had come to its last step ends at once, also without a measurement.
    """
    one_worker, two_workers, half = {"num_workers": 1}, {"num_workers": 2}, {"cpus_per_worker": 0.5}
    diverging = {"choice": [1e30], "when": {"scaling.cpus_per_worker": 0.5}}
    sweep = make_sweep(
        tmp_path,
        dataset,
        space={"scaling": [one_worker, two_workers, half], RATE: diverging},
        recipe={"training.optimizer.clip_norm": "null"},
        scheduler={"name": "median", "grace_steps": 7},  # stops nobody before the last step
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
    assert failed.curve == {}
    trials = Path(outcome.folder.file("trials.jsonl"))
    first = trials.read_text().splitlines()[0]
    assert json.loads(first)["name"] == one.name
    trials.write_text(
        trials.read_text() + first + "\n"
    )  # as if the driver had been killed before the trial's last line
    num_before = len(lines(trials.parent))
    again = run_sweep(sweep, resume=True, view=Watcher())
    begun = [line["name"] for line in lines(trials.parent)[num_before:] if line["state"] == "running"]
    assert sorted(begun) == [one.name, failed.name], "only what failed or was under way is tried again"
    (end,) = [record for record in again.records if record.name == one.name]
    assert (end.state, end.curve) == ("finished", one.curve)


def test_a_trial_in_used_workers_computes_what_it_computes_in_fresh_ones(
    others: set[str], dataset: str, tmp_path: Path
) -> None:
    """The second and third trial run in the two workers of the first; they differ in what no number depends on."""
    sweep = make_sweep(tmp_path, dataset, space={"checkpoint.keep": [1, 2, 3]}, recipe={"scaling.num_workers": 2})
    before = set(actors(alive=False))
    outcome = run_sweep(sweep, resume=False, view=Watcher())
    made = [name for actor, name in actors(alive=False).items() if actor not in before]
    assert made.count("RayTrainWorker") == 2
    fresh, *used = sorted(outcome.records, key=lambda record: record.name)
    assert [step for step, _ in fresh.curve[METRIC]] == [2, 4, 6, 8]
    assert [record.curve for record in used] == [fresh.curve] * 2
    losses = [read_curve(f"{record.run_dir}/metrics.jsonl")["loss"] for record in outcome.records]
    assert losses == [losses[0]] * 3
    assert_nothing_left(others=others)


def test_spare_workers_are_used_again_unless_they_died(others: set[str], tmp_path: Path) -> None:
    """In an actor, as Ray's controller wants it."""

    class Host:
        def __init__(self, folder: str) -> None:
            os.environ.update(ENVIRONMENT)
            self._folder = folder
            self._spare = spare_workers(keep_s=120.0)

        def fit(self, name: str) -> int:
            trainer = InProcessTrainer(
                lambda: os.getpid(),
                spare=self._spare,
                scaling_config=ray.train.ScalingConfig(num_workers=1),
                run_config=ray.train.RunConfig(name=name, storage_path=self._folder),
            )
            return int(trainer.fit().return_value)

        def release(self) -> None:
            self._spare.release()

    host = ray.remote(num_cpus=0)(Host).remote(str(tmp_path))
    first = ray.get(host.fit.remote("first"))
    assert ray.get(host.fit.remote("second")) == first
    os.kill(first, signal.SIGKILL)
    assert ray.get(host.fit.remote("third")) != first
    ray.get(host.release.remote())
    ray.kill(host)
    assert_nothing_left(others=others)


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


def test_an_interrupted_sweep_takes_its_trials_down_before_the_driver_goes(
    others: set[str], dataset: str, tmp_path: Path
) -> None:
    """Here the driver's process lives on, and with it all that Ray ends with a driver."""

    class Interrupter(Watcher):
        def on_change(self, records: Sequence[TrialRecord]) -> None:
            super().on_change(records)
            if sum(record.state == "running" and record.num_steps > 1 for record in records) == 2:
                raise KeyboardInterrupt

    mine = placement_group([{"memory": 1.0}])
    assert mine.wait(30)
    sweep = make_sweep(tmp_path, dataset, space={RATE: [1e-3, 3e-3]}, budget={"num_steps": 2000})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, resume=False, view=Interrupter())
    assert states() == {mine.id.hex(): "CREATED"}
    remove_placement_group(mine)
    assert_nothing_left(others=others)
    folder = tmp_path / "out" / "rates"
    assert {line["state"] for line in lines(folder)} == {"running"}
    assert json.loads((folder / LEASE).read_text())["ended"]


def states() -> dict[str, str]:
    """Of the placement groups that hold a place or wait for one."""
    return {name: group["state"] for name, group in placement_group_table().items() if group["state"] != "REMOVED"}
