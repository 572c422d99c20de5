"""The driver's side of a run where something is in trouble: one of its hooks, the monitor, the cluster it would join."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError, RayActorError

from raydist.core.errors import ConfigError
from raydist.runtime.cluster import connected
from raydist.runtime.monitor import RunMonitor
from raydist.runtime.trainer import _Relay
from raydist.training.hooks import Hook
from tests.servers.processes import wait_until


class Seen(Hook):
    """Keeps the steps of checkpoints, and fails at one."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_checkpoint(self, step: int) -> None:
        self.steps.append(step)
        if step == 1:
            raise OSError("no space left")


def monitor_of(take: Callable[[], Any]) -> Any:
    """What ``ray.get`` gives is what the call itself gives."""
    return SimpleNamespace(take=SimpleNamespace(remote=take))


def test_a_hook_in_trouble_does_not_end_the_relay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monitor, seen = RunMonitor(), Seen()
    monitor.add("checkpoint", 1)
    with caplog.at_level(logging.WARNING), _Relay(monitor_of(monitor.take), [seen]):
        wait_until(lambda: seen.steps == [1], timeout_s=20, what="a hook in trouble")
        monitor.add("checkpoint", 2)
        wait_until(lambda: seen.steps == [1, 2], timeout_s=20, what="the next event")
        monitor.add("checkpoint", 3)
    assert seen.steps == [1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == ["progress is not passed on: OSError: no space left"]


def test_a_lost_monitor_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    asked: list[int] = []

    def take() -> None:
        asked.append(1)
        raise RayActorError

    with caplog.at_level(logging.WARNING), _Relay(monitor_of(take), []):
        wait_until(lambda: len(asked) > 2, timeout_s=20, what="a third question")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [AuthenticationError("no token"), RuntimeError("Version mismatch: Ray 2.9")])
def test_a_cluster_that_refuses_is_no_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**unused: object) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConfigError, match="refuses this process") as caught, connected(address=address):
            pytest.fail("not connected")
    assert "RAY_AUTH_TOKEN_PATH" in (caught.value.fix or "")
    assert address in (caught.value.where or "")
