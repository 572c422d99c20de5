"""Free ports and server processes that end with the tests, whatever ends those."""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_GRPC_OFFSET = 10_000  # a SeaweedFS server takes its port + 10000 too


def free_ports(count: int, *, host: str = "127.0.0.1") -> list[int]:
    """Ports that nobody listens on, and whose gRPC twins are free as well; held open together so that all differ."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind((host, 0))
            port = probe.getsockname()[1]
            twin = stack.enter_context(socket.socket())
            try:
                twin.bind((host, port + _GRPC_OFFSET))
            except (OSError, OverflowError):
                continue
            found.append(port)
    return found


def start_process(command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process whose output goes to ``log`` and that the kernel ends when this one ends."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, env=dict(environment), stdout=stream, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
        )


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str, poll_s: float = 0.05) -> None:
    """Returns when the condition holds; fails the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(poll_s)
