"""One run on a Ray of several nodes that meets one fault after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raydist.tracking.jsonl import Curve
from tests.faults.harness import (
    FAULT_RUN,
    Driver,
    Recovery,
    assert_finished,
    assert_one_finished_run,
    write_recipe,
)
from tests.faults.ray_nodes import RayNode, RayNodes
from tests.servers.processes import wait_until

pytestmark = [pytest.mark.slow]

RecordFault = Callable[..., None]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A head, two nodes for the workers and a spare one."""
    cluster = RayNodes(tmp_path_factory.mktemp("nodes"))
    try:
        for _ in range(3):
            cluster.add_node()
        cluster.wait_for_cpus(3)
        yield cluster
    finally:
        cluster.stop()


def working_nodes(nodes: RayNodes) -> list[RayNode]:
    return [node for node in nodes.nodes if node.train_workers()]


def test_one_fault_after_the_other(
    nodes: RayNodes, dataset: str, tmp_path: Path, whole_curve: Curve, record_fault: RecordFault
) -> None:
    recipe = write_recipe(tmp_path, dataset, **FAULT_RUN)
    driver = Driver(recipe, "--address", nodes.address, environment=nodes.environment())

    driver.wait_for_step(30)
    victim = working_nodes(nodes)[0].train_workers()[0]
    recovery = Recovery(driver)
    os.kill(victim, signal.SIGKILL)
    recovery.wait()
    record_fault(
        "a worker is killed (SIGKILL)", "the workers start again from the newest checkpoint", **recovery.figures
    )

    driver.wait_for_step(100)
    victim = working_nodes(nodes)[1].train_workers()[0]
    recovery = Recovery(driver)
    os.kill(victim, signal.SIGSTOP)
    recovery.wait()
    wait_until(lambda: victim not in nodes.train_processes(), timeout_s=60, what="the hanging worker is removed")
    record_fault(
        "a worker hangs (SIGSTOP)",
        f"found after scaling.collective_timeout_s ({FAULT_RUN['scaling.collective_timeout_s']} s here); restart",
        **recovery.figures,
    )

    driver.wait_for_step(180)
    recovery = Recovery(driver)
    working_nodes(nodes)[0].kill()
    recovery.wait()
    record_fault("a node dies, a spare one is there", "the run moves to the spare node", **recovery.figures)

    assert_finished(driver, curve=whole_curve)
    nodes.assert_all_gone()


def test_the_driver_is_killed_and_started_again(
    nodes: RayNodes, dataset: str, tmp_path: Path, whole_curve: Curve, record_fault: RecordFault
) -> None:
    recipe = write_recipe(tmp_path, dataset, **FAULT_RUN)
    arguments = ("--address", nodes.address)
    driver = Driver(recipe, *arguments, environment=nodes.environment())
    driver.wait_for_step(30)

    second = Driver(recipe, *arguments, "--resume", environment=nodes.environment())
    assert second.wait() == 2
    assert "another driver is training this run" in second.output
    assert "Traceback" not in second.output

    recovery = Recovery(driver)
    driver.kill()
    third = Driver(recipe, *arguments, "--resume", environment=nodes.environment())
    recovery.wait(third)
    record_fault(
        "the driver is killed, and started again with --resume", "taken over once it is dead", **recovery.figures
    )

    third.wait_for_step(150)
    recovery = Recovery(third)
    third.terminate()
    assert third.wait() != 0
    stopped_at = third.summary()["step"]
    assert "--resume" in third.output
    nodes.assert_all_gone()
    assert_one_finished_run(
        third.run_dir, uri=third.summary()["mlflow_uri"], curve=whole_curve[:stopped_at], status="KILLED"
    )
    fourth = Driver(recipe, *arguments, "--resume", environment=nodes.environment())
    recovery.wait(fourth)
    assert recovery.steps_lost == 0
    record_fault(
        "SIGTERM to the driver, and --resume", "a checkpoint of the running step, then the end", **recovery.figures
    )

    assert_finished(fourth, curve=whole_curve)
    nodes.assert_all_gone()


def _drain(nodes: RayNodes, leaving: RayNode) -> None:
    """What a cloud's notice comes down to, once somebody has passed it on to Ray."""
    nodes.drain(leaving, deadline_s=120)


def _terminate(nodes: RayNodes, leaving: RayNode) -> None:
    """What Kubernetes sends to a pod that it evicts: Ray drains the node by itself before it ends it."""
    leaving.terminate()


@pytest.mark.parametrize(
    ("fault", "announce"), [("a node is drained (preemption notice)", _drain), ("a node gets SIGTERM", _terminate)]
)
def test_a_node_is_taken_away_with_notice(
    nodes: RayNodes, dataset: str, tmp_path: Path, whole_curve: Curve, record_fault: RecordFault,
    fault: str, announce: Callable[[RayNodes, RayNode], None],
) -> None:  # fmt: skip
    nodes.add_node()
    nodes.wait_for_cpus(3)
    recipe = write_recipe(tmp_path, dataset, **FAULT_RUN)
    driver = Driver(recipe, "--address", nodes.address, environment=nodes.environment())
    driver.wait_for_step(30)
    recovery = Recovery(driver)
    leaving = working_nodes(nodes)[0]
    announce(nodes, leaving)
    recovery.wait()
    assert not leaving.train_workers()
    assert recovery.steps_lost == 0
    record_fault(fault, "a checkpoint, then on without the node", **recovery.figures)

    assert_finished(driver, curve=whole_curve)
    leaving.kill()
    nodes.assert_all_gone()


def test_the_head_is_lost(
    nodes: RayNodes,
    dataset: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    whole_curve: Curve,
    record_fault: RecordFault,
) -> None:
    """The last test of the module: it ends the cluster."""
    recipe = write_recipe(tmp_path, dataset, **FAULT_RUN)
    driver = Driver(recipe, "--address", nodes.address, environment=nodes.environment())
    driver.wait_for_step(30)
    recovery = Recovery(driver)
    nodes.head.kill()
    assert driver.wait() != 0
    nodes.stop()

    others = RayNodes(tmp_path_factory.mktemp("others"))
    try:
        for _ in range(2):
            others.add_node()
        others.wait_for_cpus(2)
        resumed = Driver(recipe, "--address", others.address, "--resume", environment=others.environment())
        recovery.wait(resumed)
        record_fault(
            "the head is lost; a new cluster, and --resume",
            "the driver ends; the run goes on from storage (its time: a new cluster on this machine)",
            **recovery.figures,
        )
        assert_finished(resumed, curve=whole_curve)
        others.assert_all_gone()
    finally:
        others.stop()
