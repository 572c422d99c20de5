"""An elastic run on hosts of their own, whose cables are pulled."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raydist.tracking.jsonl import Curve
from tests.faults.harness import (
    FAULT_RUN,
    Driver,
    Recovery,
    assert_nothing_left_over,
    assert_one_finished_run,
    last_step,
    loss_curve,
    records,
    write_recipe,
)
from tests.faults.namespaces import INTERFACE, Hosts, can_make_hosts, network
from tests.faults.ray_nodes import RayNodes
from tests.servers.processes import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_hosts(), reason="network namespaces need root"),
]

SHORT_CUT_S = 4.0
# Elastic, and long enough to see the last fault; the learning rate is constant, so its beginning is that of the whole run.
ENDLESS = {"scaling.min_workers": 1, "training.num_steps": 1_000_000}
HEAD, FIRST, SECOND, SPARE = range(4)
# One worker adds up gradients in another order than two. Such a difference of rounding grows from step to step; that of a
# wrong batch is some tenths at once.
ROUNDING, ROUNDING_STEPS, GROWN_ROUNDING = 2e-4, 50, 2e-2


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with network(4) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def nodes(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A head and two nodes; the spare host is empty."""
    cluster = RayNodes(
        tmp_path_factory.mktemp("nodes"),
        head_where=hosts.where(HEAD),
        head_ip=hosts.ip(HEAD),
        environment={"GLOO_SOCKET_IFNAME": INTERFACE},
    )
    try:
        for host in (FIRST, SECOND):
            cluster.add_node(where=hosts.where(host), ip=hosts.ip(host))
        cluster.wait_for_cpus(2)
        yield cluster
    finally:
        cluster.stop()


def attempts(run_dir: str) -> int:
    return len({record["attempt"] for record in records(run_dir)})


def test_cables_are_pulled(
    hosts: Hosts,
    nodes: RayNodes,
    dataset: str,
    tmp_path: Path,
    whole_curve: Curve,
    record_fault: Callable[..., None],
) -> None:
    recipe = write_recipe(tmp_path, dataset, **{**FAULT_RUN, **ENDLESS})
    driver = Driver(recipe, "--address", nodes.address, where=hosts.where(HEAD), environment=nodes.environment())

    driver.wait_for_step(30)
    hosts.unplug(SECOND)
    time.sleep(SHORT_CUT_S)  # the length of the fault itself
    hosts.plug(SECOND)
    healed_at, seen = time.time(), last_step(driver.run_dir)
    driver.wait_for_step(seen + 5)
    assert attempts(driver.run_dir) == 1
    record_fault(
        f"a node's network is cut for {SHORT_CUT_S:.0f} s",
        "the step waits; no restart",
        steps_lost=0,
        recovery_s=next(line["time"] for line in records(driver.run_dir) if line["time"] > healed_at) - healed_at,
    )

    recovery = Recovery(driver)
    hosts.part(FIRST, SECOND)
    wait_until(lambda: len(nodes.train_processes()) < 3, timeout_s=300, what="the workers give the collective up")
    hosts.join(FIRST, SECOND)
    recovery.wait()
    record_fault(
        "two workers do not reach each other, but the head does; healed",
        f"the collective ends after scaling.collective_timeout_s ({FAULT_RUN['scaling.collective_timeout_s']} s here); restart",
        **recovery.figures,
    )

    driver.wait_for_step(last_step(driver.run_dir) + 20)
    recovery = Recovery(driver)
    hosts.unplug(SECOND)
    recovery.wait()
    record_fault(
        "a node's network is cut for good, no spare node, scaling.min_workers=1",
        "the run goes on with one worker; same batches, same order",
        **recovery.figures,
    )

    recovery = Recovery(driver)
    nodes.add_node(where=hosts.where(SPARE), ip=hosts.ip(SPARE))
    recovery.wait()
    assert recovery.steps_lost == 0
    record_fault("a node is added to an elastic run", "a checkpoint, then two workers again", **recovery.figures)

    driver.terminate()
    assert driver.wait() != 0
    curve = loss_curve(driver.run_dir)
    assert [step for step, _ in curve] == list(range(1, len(curve) + 1))
    done = re.findall(r"going on at step (\d+) of \d+, 1 worker\b", driver.output)
    first_alone = min(int(step) for step in done) + 1
    assert first_alone < len(whole_curve)
    for (step, mine), (_, whole) in zip(curve, whole_curve, strict=False):
        if step < first_alone:
            assert mine == whole, f"step {step}"
        else:
            tolerance = ROUNDING if step < first_alone + ROUNDING_STEPS else GROWN_ROUNDING
            assert mine == pytest.approx(whole, rel=0, abs=tolerance), (
                f"step {step}, with one worker from {first_alone}"
            )
    uri = driver.summary()["mlflow_uri"]
    assert_one_finished_run(driver.run_dir, uri=uri, curve=curve, status="KILLED", rounding=ROUNDING)
    assert_nothing_left_over(driver.run_dir)
    hosts.plug(SECOND)  # a node that is cut off learns that it was given up when its network is back
    wait_until(lambda: not nodes.train_processes(), timeout_s=120, what="Ray Train's processes end with their driver")
