"""Hosts with addresses of their own on this machine: network namespaces on one bridge, whose cables a test can pull."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from tests.servers.processes import wait_until

INTERFACE = "eth0"


def can_make_hosts() -> bool:
    """Whether this process may make namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return made


class Hosts:
    """So many hosts that reach each other and nobody else.

    Args:
        count: of hosts.
    """

    def __init__(self, count: int) -> None:
        self._tag = f"{os.getpid() % 100_000}"
        self._bridge = f"rb{self._tag}"
        self._subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.names: list[str] = []
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "set", self._bridge, "up")
            for _ in range(count):
                self._add()
        except BaseException:
            self.close()
            raise

    def where(self, host: int) -> tuple[str, ...]:
        """The words before a command that run it on a host."""
        return ("ip", "netns", "exec", self.names[host])

    def ip(self, host: int) -> str:
        """A host's address."""
        return f"{self._subnet}.{host + 1}"

    def unplug(self, host: int) -> None:
        """Pulls a host's cable."""
        _ip("link", "set", self._cable(host), "down")

    def plug(self, host: int) -> None:
        """Puts the cable back."""
        _ip("link", "set", self._cable(host), "up")

    def part(self, first: int, second: int) -> None:
        """Two hosts do not reach each other any more, but everybody else does."""
        for here, there in ((first, second), (second, first)):
            _ip("-n", self.names[here], "route", "add", "blackhole", f"{self.ip(there)}/32")

    def join(self, first: int, second: int) -> None:
        """The opposite of :meth:`part`."""
        for here, there in ((first, second), (second, first)):
            _ip("-n", self.names[here], "route", "delete", "blackhole", f"{self.ip(there)}/32")

    def close(self) -> None:
        """Removes everything, and waits until the kernel has done so."""
        for host, name in enumerate(self.names):
            for words in (("link", "delete", self._cable(host)), ("netns", "delete", name)):
                subprocess.run(["ip", *words], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True, check=False)
        listing = ["ip", "-o", "link", "show"]
        wait_until(
            lambda: self._bridge not in subprocess.run(listing, capture_output=True, text=True).stdout,
            timeout_s=30,
            what="the network is gone",
        )

    def _add(self) -> None:
        host = len(self.names)
        name = f"rn{self._tag}-{host}"
        _ip("netns", "add", name)
        self.names.append(name)
        _ip("link", "add", self._cable(host), "type", "veth", "peer", "name", INTERFACE, "netns", name)
        _ip("link", "set", self._cable(host), "master", self._bridge, "up")
        _ip("-n", name, "address", "add", f"{self.ip(host)}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", name, "link", "set", interface, "up")

    def _cable(self, host: int) -> str:
        return f"rv{self._tag}-{host}"


@contextlib.contextmanager
def network(count: int) -> Iterator[Hosts]:
    """Hosts that are removed at the end of the block."""
    hosts = Hosts(count)
    try:
        yield hosts
    finally:
        hosts.close()


def _ip(*words: str) -> None:
    command: Sequence[str] = ["ip", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
