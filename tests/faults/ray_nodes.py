"""A Ray cluster of real processes on this machine: each node is its own ``ray start``, so that it can be killed by itself."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.servers.processes import free_ports, start_process, wait_until

_START_S = 240.0
_STARTS = 3
_OBJECT_STORE_BYTES = 80 * 1024**2
# A silent node is given up after about 5 s instead of a minute.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class RayNode:
    """One node: the processes below one ``ray start --block``.

    Args:
        command: that command.
        name: that Ray knows the node by.
        where: the words before a command that run it on this node's host, e.g. in its network namespace.
        environment: of the command.
        log: what it prints.
    """

    def __init__(
        self, command: Sequence[str], *, name: str, where: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.where = tuple(where)
        self._log = log
        self._start = lambda: start_process([*where, *command], environment=environment, log=log)
        self._starts = 1
        self.is_killed = False
        self.process = self._start()

    def wait_until_started(self) -> None:
        """Returns when Ray says so; Ray gives up after 30 s, which on a busy machine is tried again."""

        def has_started() -> bool:
            if self.process.poll() is not None:
                assert self._starts < _STARTS, f"{self.name} ended:\n{self._log.read_text(errors='replace')[-2000:]}"
                self._starts += 1
                self.process = self._start()
            return "Ray runtime started" in self._log.read_text(errors="replace")

        wait_until(has_started, timeout_s=_START_S, what=f"{self.name} starts; see {self._log}")

    def processes(self) -> list[psutil.Process]:
        """All that lives of the node, workers included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        return []

    def train_workers(self) -> list[int]:
        """Process ids of the Ray Train workers on the node."""
        return sorted(process.pid for process in self.processes() if "RayTrainWorker" in _command_line(process))

    def terminate(self) -> None:
        """SIGTERM to its ``ray start``, as an orchestrator ends a container, without waiting."""
        self.process.terminate()

    def kill(self) -> None:
        """SIGKILL to every process of the node at once, as when the machine loses its power."""
        self.is_killed = True
        victims = self.processes()
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        self.process.wait()
        psutil.wait_procs(victims, timeout=30)


class RayNodes:
    """A head without CPUs, and nodes of one CPU each.

    Args:
        folder: for logs.
        head_where: words before the head's command.
        head_ip: the head's address.
        environment: more of it, for all processes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        head_where: Sequence[str] = (),
        head_ip: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._environment = {**_ENVIRONMENT, **(environment or {})}
        self._token = secrets.token_hex(32)
        # Socket paths below it must stay short.
        self._temp_dir = tempfile.mkdtemp(prefix="rd", dir="/tmp")
        self.nodes: list[RayNode] = []
        port, dashboard, client = free_ports(3)
        self.address = f"{head_ip}:{port}"
        self.head = self._start(
            ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
             f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={self._temp_dir}"],
            where=head_where,
            ip=head_ip,
        )  # fmt: skip
        try:
            self.head.wait_until_started()
        except BaseException:
            self.stop()
            raise

    def add_node(self, *, num_cpus: int = 1, where: Sequence[str] = (), ip: str | None = None) -> RayNode:
        """Starts a node; :meth:`wait_for_cpus` says when it has joined."""
        arguments = [f"--address={self.address}", f"--num-cpus={num_cpus}"]
        if ip:  # a host of its own has files of its own
            arguments.append(f"--temp-dir={tempfile.mkdtemp(prefix='n', dir=self._temp_dir)}")
        node = self._start(arguments, where=where, ip=ip)
        self.nodes.append(node)
        if not ip:  # nodes of one host take names and ports from the same files
            node.wait_until_started()
        return node

    def wait_for_cpus(self, num_cpus: int) -> None:
        """Returns when all nodes have started and the cluster has so many CPUs."""
        for node in self.nodes:
            if not node.is_killed:
                node.wait_until_started()
        program = (
            "import ray, sys, time\n"
            f"ray.init({self.address!r}, log_to_driver=False, logging_level='ERROR')\n"
            f"while ray.cluster_resources().get('CPU', 0) != {num_cpus}: time.sleep(0.2)\n"
        )
        self.run(program)

    def drain(self, node: RayNode, *, deadline_s: int) -> None:
        """Tells the cluster that a node will be taken away, as a cloud does before it reclaims one."""
        program = (
            "import ray\n"
            f"ray.init({self.address!r}, log_to_driver=False, logging_level='ERROR')\n"
            f"print('id', *(node['NodeID'] for node in ray.nodes() if node['NodeName'] == {node.name!r}))\n"
        )
        node_id = self.run(program).rsplit("id", 1)[1].strip()
        ray = str(Path(sys.executable).with_name("ray"))
        command = [
            *self.head.where, ray, "drain-node", f"--address={self.address}", f"--node-id={node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=reclaimed",
            f"--deadline-remaining-seconds={deadline_s}",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=_START_S, check=False
        )
        assert done.returncode == 0, done.stderr

    def placement_groups(self) -> int:
        """Placement groups that are not removed."""
        program = (
            "import ray\n"
            f"ray.init({self.address!r}, log_to_driver=False, logging_level='ERROR')\n"
            "table = ray.util.placement_group_table().values()\n"
            "print('left', sum(group['state'] != 'REMOVED' for group in table))\n"
        )
        return int(self.run(program).rsplit("left", 1)[1])

    def run(self, program: str) -> str:
        """Runs a Python program on the head; returns its output."""
        command = [*self.head.where, sys.executable, "-c", program]
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=_START_S, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def environment(self) -> dict[str, str]:
        """For processes of the cluster and for drivers: the token lets them in."""
        return {**os.environ, **self._environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    def train_processes(self) -> list[int]:
        """Process ids of Ray Train's workers and controllers, on all nodes."""
        names = ("RayTrainWorker", "TrainController")
        alive = [process for node in (self.head, *self.nodes) for process in node.processes()]
        return [process.pid for process in alive if any(name in _command_line(process) for name in names)]

    def assert_all_gone(self) -> None:
        """After a driver's end: no process of Ray Train, and no reserved place in the cluster."""
        wait_until(lambda: not self.train_processes(), timeout_s=60, what="Ray Train's processes end with their driver")
        wait_until(lambda: self.placement_groups() == 0, timeout_s=90, what="placement groups are given back")

    def words_of_workers(self) -> str:
        """What the workers of all nodes have said on stderr; Ray keeps it in files."""
        files = sorted(Path(self._temp_dir).glob("session_*/logs/worker-*.err"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def stop(self) -> None:
        """Kills all nodes and removes their files."""
        for node in (*self.nodes, self.head):
            node.kill()
        shutil.rmtree(self._temp_dir, ignore_errors=True)

    def _start(self, arguments: Sequence[str], *, where: Sequence[str], ip: str | None) -> RayNode:
        ray = str(Path(sys.executable).with_name("ray"))
        (agent,) = free_ports(1)
        name = "head" if "--head" in arguments else f"node-{len(self.nodes)}"
        command = [
            ray, "start", *arguments, "--block", f"--node-name={name}", "--disable-usage-stats",
            f"--object-store-memory={_OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0",
            f"--dashboard-agent-listen-port={agent}", *([f"--node-ip-address={ip}"] if ip else []),
        ]  # fmt: skip
        log = self._folder / f"{name}.log"
        return RayNode(command, name=name, where=where, environment=self.environment(), log=log)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
