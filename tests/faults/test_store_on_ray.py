"""A bucket in trouble, damaged files in it, a full disk before it, while workers on two Ray nodes read from it and save to it;
and an MLflow server that is killed meanwhile."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from raydist.checkpoint.layout import complete_checkpoints, shard_name
from raydist.core import storage
from raydist.tracking.find import list_runs
from raydist.tracking.jsonl import Curve, read_records
from tests.faults.disks import fill, small_disk
from tests.faults.harness import (
    FAULT_RUN,
    Driver,
    Recovery,
    assert_finished,
    assert_one_finished_run,
    last_step,
    records,
    write_recipe,
)
from tests.faults.ray_nodes import RayNodes
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.mlflow_server import MlflowServer
from tests.servers.object_store import ObjectStore
from tests.servers.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RecordFault = Callable[..., None]
Span = tuple[float, float]
SAVE_EVERY = 10
# What the bucket goes through, and for how many seconds.
TROUBLE: dict[str, tuple[Callable[[FaultyProxy], None], float]] = {
    "refused": (lambda proxy: proxy.refuse(), 20.0),
    "slow": (lambda proxy: proxy.slow(bytes_per_s=300_000.0, delay_s=0.2), 30.0),
    "500": (lambda proxy: proxy.errors(rate=0.4, status=500), 30.0),
    "503": (lambda proxy: proxy.errors(rate=0.4, status=503), 30.0),
}


class Site:
    """A head and two nodes, each with a cache and temporary files of its own; they reach the S3 server by a proxy."""

    def __init__(self, folder: Path, object_store: ObjectStore) -> None:
        self.proxy = FaultyProxy(object_store.endpoint)
        self.proxy.start()
        self.folders = [folder / f"node-{number}" for number in range(2)]
        environment = object_store.environment(endpoint=self.proxy.endpoint)
        self.nodes = RayNodes(folder, head_where=_with_folders(folder / "head"), environment=environment)

    def add_nodes(self) -> None:
        for folder in self.folders:
            self.nodes.add_node(where=_with_folders(folder))
        self.nodes.wait_for_cpus(len(self.folders))

    def drive(self, recipe: Path, *arguments: str) -> Driver:
        return Driver(recipe, "--address", self.nodes.address, *arguments, environment=self.nodes.environment())

    def shards(self) -> list[int]:
        """How many shards of data each node's cache holds."""
        return [len(storage.list_names(str(_shards(folder)))) for folder in self.folders]

    def forget_shards(self) -> None:
        for folder in self.folders:
            shutil.rmtree(_shards(folder), ignore_errors=True)

    def spools(self) -> list[bool]:
        """Whether each node has stored anything by way of its temporary folder."""
        return [self.spool(number).is_dir() for number in range(len(self.folders))]

    def spool(self, number: int) -> Path:
        """Through which a node's shards of checkpoints go."""
        return self.folders[number] / "tmp" / f"raydist-{os.getuid()}"

    def assert_tidy(self) -> None:
        """No worker is left on the nodes, and of their files no temporary one."""
        self.nodes.assert_all_gone()
        cached = [name for folder in self.folders for name in storage.list_files(str(folder / "cache"))]
        assert [name for name in cached if "partial" in name] == []
        assert [name for folder in self.folders for name in storage.list_files(str(folder / "tmp"))] == []

    def stop(self) -> None:
        self.nodes.stop()
        self.proxy.stop()


def _with_folders(folder: Path) -> tuple[str, ...]:
    (folder / "tmp").mkdir(parents=True)
    return ("env", f"TMPDIR={folder / 'tmp'}", f"XDG_CACHE_HOME={folder / 'cache'}")


def _shards(folder: Path) -> Path:
    return folder / "cache" / "raydist" / "shards"


@pytest.fixture(scope="module")
def running_site(object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"), object_store)
    try:
        site.add_nodes()
        yield site
    finally:
        site.stop()


@pytest.fixture
def site(running_site: Site) -> Iterator[Site]:
    """The proxy passes everything again after each test."""
    yield running_site
    running_site.proxy.pass_all()


def recipe_in(bucket: str, dataset: str, folder: Path, **changes: Any) -> Path:
    """Copies the dataset into the bucket; a recipe that reads it there and runs there."""
    for name in storage.list_files(dataset):
        storage.upload_file(f"{dataset}/{name}", f"{bucket}/data/{name}")
    places = {
        "data.cache_dir": "null",
        "tracking.mlflow_uri": mlflow_uri(folder),
        "checkpoint.every_steps": SAVE_EVERY,
        "scaling.collective_timeout_s": 120,
    }
    return write_recipe(folder, f"{bucket}/data", runs=f"{bucket}/runs", **{**FAULT_RUN, **places, **changes})


def mlflow_uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def assert_tidy(site: Site, driver: Driver, folder: Path) -> None:
    """Nothing is left on the nodes, with the driver and in the bucket."""
    assert_no_half_objects(driver.run_dir)
    site.assert_tidy()
    assert storage.list_files(str(folder / "tmp")) == []


def assert_no_half_objects(run_dir: str) -> None:
    bucket = run_dir.removeprefix("s3://").partition("/")[0]
    assert boto3.client("s3").list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


def go_through_trouble(proxy: FaultyProxy) -> dict[str, Span]:
    """One kind after the other, without a pause; from when to when each of them lasted."""
    spans = {}
    for name, (begin, seconds) in TROUBLE.items():
        began = time.time()
        proxy.pass_all()
        begin(proxy)
        time.sleep(seconds)  # the length of the fault itself
        spans[name] = (began, time.time())
    proxy.pass_all()
    return spans


def within(lines: list[dict[str, Any]], span: Span) -> list[int]:
    """The steps of what was logged in that time."""
    return [line["step"] for line in lines if span[0] < line["time"] < span[1]]


def seconds_to(lines: list[dict[str, Any]], *, after: float) -> float:
    return next(line["time"] for line in lines if line["time"] > after) - after


def test_minutes_of_trouble_with_the_bucket(
    site: Site, bucket: str, dataset: str, output_dir: Path, whole_curve: Curve, record_fault: RecordFault
) -> None:
    recipe = recipe_in(bucket, dataset, output_dir, **{"checkpoint.keep": len(whole_curve)})
    driver = site.drive(recipe)
    driver.wait_for_step(2 * SAVE_EVERY)
    assert [len(node.train_workers()) for node in site.nodes.nodes] == [1, 1]
    spans = go_through_trouble(site.proxy)
    assert driver.process.poll() is None, "the run was over before the trouble was"
    assert_finished(driver, curve=whole_curve)
    assert_tidy(site, driver, output_dir)

    steps = records(driver.run_dir)
    assert [line["step"] for line in steps] == [step for step, _ in whole_curve], "a step was done twice"
    saves = [line for line in read_records(f"{driver.run_dir}/metrics.jsonl") if "checkpoint/failed" in line]
    assert [line["step"] for line in saves if line["checkpoint/failed"]] == []
    kept = complete_checkpoints(driver.run_dir)
    assert [line["step"] for line in saves] == [checkpoint.step for checkpoint in kept]
    for checkpoint in kept:
        found = {name: storage.sha256(f"{checkpoint.folder}/{name}") for name in checkpoint.files}
        assert found == {name: file.sha256 for name, file in checkpoint.files.items()}
    for name in ("slow", "500", "503"):
        assert within(steps, spans[name]), f"no step while {name}"
        assert within(saves, spans[name]), f"no save while {name}"
    assert site.spools() == [True, True]
    for rank in range(2):
        answers = {one.status for one in site.proxy.exchanges if shard_name(rank) in one.path}
        assert {500, 503} <= answers

    on_nodes = "training went on without a restart, every save arrived"
    record_fault(
        "S3 server down for 20 s, run on two Ray nodes",
        "training waited for its save and went on (its time: the next save stored, by a slow server)",
        steps_lost=0,
        recovery_s=seconds_to(saves, after=spans["refused"][1]),
    )
    record_fault("S3 server slow for 30 s, run on two Ray nodes", on_nodes, steps_lost=0, recovery_s=None)
    record_fault(
        "S3 server answers 500 at random for 30 s, run on two Ray nodes", on_nodes, steps_lost=0, recovery_s=None
    )
    record_fault(
        "S3 server answers 503 at random for 30 s, run on two Ray nodes",
        on_nodes,
        steps_lost=0,
        recovery_s=seconds_to(saves, after=spans["503"][1]),
    )


def _flip(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(("name", "damage"), [("bit-flipped", _flip), ("truncated", _cut)])
def test_a_checkpoint_file_of_one_rank_is_damaged(
    site: Site, bucket: str, dataset: str, output_dir: Path, whole_curve: Curve, record_fault: RecordFault,
    name: str, damage: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    num_steps = 150
    recipe = recipe_in(bucket, dataset, output_dir, **{"training.num_steps": num_steps})
    driver = site.drive(recipe)
    driver.wait_for_step(2 * SAVE_EVERY)
    site.proxy.slow(delay_s=0.05)  # saves hold the run up, so that it is not over before it is stopped
    driver.terminate()
    assert driver.wait() != 0
    site.proxy.pass_all()
    older, newest = complete_checkpoints(driver.run_dir)[-2:]
    assert newest.step == driver.summary()["step"]

    shard = f"{newest.folder}/{shard_name(1)}"
    storage.write_bytes(shard, damage(storage.read_bytes(shard)))
    recovery = Recovery(driver)
    resumed = site.drive(recipe, "--resume")
    recovery.wait(resumed)
    assert recovery.steps_lost == newest.step - older.step
    for words in (site.nodes.words_of_workers(), resumed.output):
        assert f"checkpoint of step {newest.step} is passed over, trying an older one" in words
        assert shard in words
    assert_finished(resumed, curve=whole_curve[:num_steps])
    assert_tidy(site, resumed, output_dir)
    record_fault(
        f"{name} checkpoint file of one rank, run on two Ray nodes",
        "--resume went on from the one before, and names the file",
        **recovery.figures,
    )


def test_a_corrupted_shard_of_data(
    site: Site, bucket: str, dataset: str, output_dir: Path, whole_curve: Curve, record_fault: RecordFault
) -> None:
    num_steps = 50
    recipe = recipe_in(bucket, dataset, output_dir, **{"training.num_steps": num_steps})
    (name,) = (name for name in storage.list_names(f"{bucket}/data/train") if name.startswith("shard-"))
    shard = f"{bucket}/data/train/{name}"
    content = storage.read_bytes(shard)
    storage.write_bytes(shard, _flip(content))
    site.forget_shards()

    driver = site.drive(recipe)
    assert driver.wait() == 2, driver.output
    assert driver.summary()["error"] == "DataError"
    assert driver.summary()["where"] == shard
    assert "sha256" in driver.summary()["found"]
    assert driver.output.count(f"where:    {shard}") == 1
    assert "Traceback" not in driver.output
    assert len(driver.output.splitlines()) < 25
    assert_one_finished_run(driver.run_dir, uri=mlflow_uri(output_dir), curve=[], status="FAILED")
    assert storage.read_json(f"{driver.run_dir}/driver.json")["ended"]
    assert_no_half_objects(driver.run_dir)
    site.assert_tidy()
    assert site.shards() == [0, 0]

    storage.write_bytes(shard, content)
    mended_at = time.time()
    resumed = site.drive(recipe, "--resume")
    assert_finished(resumed, curve=whole_curve[:num_steps])
    assert_tidy(site, resumed, output_dir)
    assert site.shards() == [1, 1]
    record_fault(
        "corrupted shard in the bucket, run on two Ray nodes",
        "one screen that names the shard; mended, --resume finishes",
        steps_lost=None,
        recovery_s=seconds_to(records(driver.run_dir), after=mended_at),
    )


def test_the_spool_of_one_node_is_full(
    site: Site, bucket: str, dataset: str, output_dir: Path, whole_curve: Curve, record_fault: RecordFault
) -> None:
    num_steps = 150
    changes = {"training.num_steps": num_steps, "checkpoint.keep": num_steps}
    recipe = recipe_in(bucket, dataset, output_dir, **changes)
    with small_disk(site.spool(1)) as disk:
        driver = site.drive(recipe)
        driver.wait_for_step(2 * SAVE_EVERY)
        site.proxy.slow(delay_s=0.1)  # saves hold the run up, so that it is not over before there is room again
        ballast = disk / "ballast"

        def a_save_has_failed() -> bool:
            fill(ballast)  # a shard that was on its way leaves room when it has gone
            return str(disk) in site.nodes.words_of_workers()

        wait_until(a_save_has_failed, timeout_s=120, what="a save fails", poll_s=0.2)
        ballast.unlink()
        freed_at = time.time()
        site.proxy.pass_all()
        assert_finished(driver, curve=whole_curve[:num_steps])
        assert_tidy(site, driver, output_dir)
    assert "choose another disk by checkpoint.spool_dir" in site.nodes.words_of_workers()

    assert [line["step"] for line in records(driver.run_dir)] == list(range(1, num_steps + 1)), "a step was done twice"
    saves = [line for line in read_records(f"{driver.run_dir}/metrics.jsonl") if "checkpoint/failed" in line]
    stored = [line for line in saves if not line["checkpoint/failed"]]
    assert len(stored) < len(saves)
    assert saves[-1] in stored
    assert [line["step"] for line in stored] == [checkpoint.step for checkpoint in complete_checkpoints(driver.run_dir)]
    record_fault(
        "disk full on one node's checkpoint spool, run on two Ray nodes",
        "a save is lost, the run is not (its time: the next save stored)",
        steps_lost=0,
        recovery_s=seconds_to(stored, after=freed_at),
    )


@pytest.mark.mlflow_server
def test_the_mlflow_server_is_killed_and_started_again(
    site: Site, bucket: str, dataset: str, output_dir: Path, whole_curve: Curve, record_fault: RecordFault
) -> None:
    num_steps = 150
    with MlflowServer(output_dir / "mlflow") as mlflow:
        changes = {"training.num_steps": num_steps, "tracking.mlflow_uri": mlflow.url}
        driver = site.drive(recipe_in(bucket, dataset, output_dir, **changes))
        driver.wait_for_step(2 * SAVE_EVERY)
        assert [run.status for run in list_runs(mlflow.url)] == ["RUNNING"]
        site.proxy.slow(delay_s=0.2)  # saves hold the run up, so that it is not over before the server is back
        mlflow.kill()
        killed_at = time.time()
        driver.wait_for_step(last_step(driver.run_dir) + 2 * SAVE_EVERY)
        mlflow.start()
        back_at, seen = time.time(), last_step(driver.run_dir)
        wait_until(lambda: (list_runs(mlflow.url)[0].last_step or 0) >= seen, timeout_s=60, what="MLflow catches up")
        caught_up_s = time.time() - back_at
        assert driver.process.poll() is None, "the run was over before MLflow was back"
        site.proxy.pass_all()
        assert_finished(driver, curve=whole_curve[:num_steps])
    assert_tidy(site, driver, output_dir)

    steps = records(driver.run_dir)
    assert [(line["attempt"], line["step"]) for line in steps] == [(1, step) for step in range(1, num_steps + 1)]
    assert within(steps, (killed_at, back_at)), "no step while MLflow was away"
    record_fault(
        "MLflow killed and started again, run on two Ray nodes",
        "training went on without a restart, no step twice (its time: MLflow has all steps)",
        steps_lost=0,
        recovery_s=caught_up_s,
    )
