"""A Ray cluster of several nodes on this machine: real ``ray start`` processes, ended by their process ids.

For demonstrations and tests. The dashboard listens on loopback, and a token made for this cluster guards every port but those
of the metrics, which Ray shows to whoever asks; nothing of another Ray on the machine is touched, and nothing of the user's Ray
configuration is read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from raydist.core.errors import ClusterError

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 120.0
_START_ATTEMPTS = 3
_STOP_TIMEOUT_S = 15.0
_POLL_S = 0.2
_OBJECT_STORE_BYTES = 128 * 2**20
# A dead node is noticed after seconds instead of half a minute, and workers get their share of a busy machine.
_RAY_SETTINGS = {
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class LocalNode:
    """One node.

    Attributes:
        process: ``ray start --block``, the parent of the node's processes.
        log_path: what it printed.
        dashboard_port: of a head; 0 elsewhere.
    """

    process: subprocess.Popen[bytes]
    log_path: str
    dashboard_port: int = 0
    _seen: dict[int, psutil.Process] = field(default_factory=dict)

    def log(self) -> str:
        """What ``ray start`` printed."""
        with open(self.log_path, errors="replace") as stream:
            return stream.read()

    def has_started(self) -> bool:
        """Whether the node has joined."""
        return "Ray runtime started" in self.log()

    def family(self) -> list[psutil.Process]:
        """The node's living processes: raylet, workers, agents, and a head's servers; also those whose parent has died."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            self._seen |= {process.pid: process for process in (parent, *parent.children(recursive=True))}
        return [process for process in self._seen.values() if process.is_running()]


class LocalRay:
    """Several Ray nodes on one machine.

    Args:
        environment: of the nodes, on top of this process's own; what a node of a real cluster would have from its image and
            its secrets.

    Attributes:
        folder: of the session, the token and the logs; removed at the end.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.folder = tempfile.mkdtemp(prefix="rd-")  # short: Ray's socket names must fit in 107 bytes
        self._token_path = os.path.join(self.folder, "token")
        with open(os.open(self._token_path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
        self._port = free_port()
        self._environment = dict(environment or {})
        self.nodes: list[LocalNode] = []

    def __enter__(self) -> LocalRay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Of the cluster, for drivers."""
        return f"{_HOST}:{self._port}"

    @property
    def jobs_address(self) -> str:
        """Of the jobs API, which is the dashboard's."""
        return f"http://{_HOST}:{self.nodes[0].dashboard_port}"

    def client_environment(self) -> dict[str, str]:
        """What a client of this cluster has to know: where the token is."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": self._token_path}

    def start_head(self, *, num_cpus: int = 0, environment: Mapping[str, str] | None = None) -> LocalNode:
        """Starts the first node.

        Raises:
            ClusterError: it does not come up.
        """
        dashboard_port = free_port()
        words = ["--head", "--port", str(self._port), "--dashboard-host", _HOST, "--temp-dir", self.folder]
        words += ["--dashboard-port", str(dashboard_port), "--ray-client-server-port", str(free_port())]
        return self._bring_up(words, num_cpus=num_cpus, environment=environment, dashboard_port=dashboard_port)

    def add_node(self, *, num_cpus: int = 1, environment: Mapping[str, str] | None = None) -> LocalNode:
        """Starts another node, which has joined when this returns.

        Raises:
            ClusterError: it does not come up.
        """
        return self._bring_up(["--address", self.address], num_cpus=num_cpus, environment=environment)

    def kill(self, node: LocalNode) -> None:
        """SIGKILL to everything that the node runs, as if its machine had lost power."""
        family = node.family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
        node.process.wait()

    def stop(self) -> None:
        """Ends all nodes, and removes the session."""
        for node in reversed(self.nodes):
            family = node.family()
            with contextlib.suppress(ProcessLookupError):
                node.process.terminate()
            _, alive = psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            node.process.wait()
        self.nodes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _bring_up(
        self, words: list[str], *, num_cpus: int, environment: Mapping[str, str] | None, dashboard_port: int = 0
    ) -> LocalNode:
        """Ray gives a node half a minute to start, which is not always enough on a busy machine: it gets a few tries."""
        for _ in range(_START_ATTEMPTS):
            node = self._start(words, num_cpus=num_cpus, environment=environment)
            node.dashboard_port = dashboard_port
            if _comes_up(node):
                return node
            self.kill(node)
            self.nodes.remove(node)
        last_words = [line for line in node.log().splitlines() if line.strip()][-6:]
        raise ClusterError("a Ray node did not start", where=_HOST, found="\n".join(last_words)[:1000])

    def _start(self, words: list[str], *, num_cpus: int, environment: Mapping[str, str] | None) -> LocalNode:
        log_path = os.path.join(self.folder, f"node-{len(self.nodes)}.log")
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            "--node-ip-address", _HOST, "--num-cpus", str(num_cpus), "--num-gpus", "0",
            "--object-store-memory", str(_OBJECT_STORE_BYTES),
            "--dashboard-agent-listen-port", str(free_port()), "--metrics-export-port", str(free_port()),
            *words,
        ]  # fmt: skip
        with open(log_path, "wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._node_environment(), **(environment or {})},
                cwd=self.folder,
            )
        node = LocalNode(process, log_path)
        self.nodes.append(node)
        return node

    def _node_environment(self) -> dict[str, str]:
        scripts = sysconfig.get_path("scripts")
        mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {
            **mine,
            "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
            "OMP_NUM_THREADS": "1",
            **_RAY_SETTINGS,
            **self.client_environment(),
            **self._environment,
        }


def _comes_up(node: LocalNode) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while node.process.poll() is None and time.monotonic() < deadline:
        node.family()
        if node.has_started() and (not node.dashboard_port or _listens(node.dashboard_port)):
            return True
        time.sleep(_POLL_S)
    return False


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((_HOST, port)) == 0
