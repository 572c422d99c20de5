"""What preflight makes of nodes that are silent, and of servers that refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as torch_dist

from raydist.checkpoint.store import spool_root
from raydist.config.cluster import PreflightConfig
from raydist.config.load import resolve
from raydist.core.errors import TrackingError
from raydist.runtime import preflight as module
from raydist.runtime.local_ray import free_port
from raydist.runtime.preflight import Check, Expectations, preflight
from raydist.runtime.preflight_probe import NodeFacts, NodeProbe
from tests.training.cases import recipe_values


class Reference:
    """An answer, or none: what a call of an actor returns at once."""

    def __init__(self, answer: Callable[[], Any] | None) -> None:
        self.answer = answer


class Actor:
    """A probe without an actor around it; ``asked`` holds the names of the questions."""

    def __init__(self, *, is_silent: bool, probe: NodeProbe | None = None) -> None:
        self.asked: list[str] = []
        self._is_silent = is_silent
        self._probe = probe or NodeProbe()

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any, **options: Any) -> Reference:
            self.asked.append(name)
            return Reference(None if self._is_silent else lambda: getattr(self._probe, name)(*args, **options))

        return SimpleNamespace(remote=remote)


def wait(references: list[Reference], **unused: Any) -> tuple[list[Reference], list[Reference]]:
    return [one for one in references if one.answer], [one for one in references if not one.answer]


def test_a_silent_node_is_asked_once_and_the_others_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = {"a": Actor(is_silent=False), "b": Actor(is_silent=True)}
    nodes = module._Nodes(actors, workers=["a", "b"], timeout_s=60)
    monkeypatch.setattr(module, "_probes", lambda timeout_s: contextlib.nullcontext(nodes))
    monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(module.ray, "wait", wait)
    monkeypatch.setattr(module.ray, "get", lambda reference: reference.answer())
    checks = {check.name: check for check in preflight(Expectations())}
    assert checks["versions"].problem == "b: no answer within 1m00s"
    assert checks["clocks"].passed
    assert actors["b"].asked == ["facts"]
    assert actors["a"].asked == ["facts", *["now"] * 5]


def test_a_clock_that_falls_silent_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor(is_silent=True)
    monkeypatch.setattr(module.ray, "wait", wait)
    check = module._clocks(module._Nodes({"b": actor}, workers=["b"], timeout_s=60), Expectations())
    assert check.problem == "b: no answer"
    assert actor.asked == ["now"]


class FixedProbe(NodeProbe):
    """A node whose space, clock and network are given."""

    disk_free_bytes, shared_memory_free_bytes, skew_s = 3 * 2**30, 48 * 2**20, 0.0
    reduces = True

    def facts(self, **asked: Any) -> NodeFacts:
        space = {"disk_free_bytes": self.disk_free_bytes, "shared_memory_free_bytes": self.shared_memory_free_bytes}
        return dataclasses.replace(super().facts(**asked), **space)

    def now(self) -> float:
        return super().now() + self.skew_s

    def rendezvous(self) -> str:
        return "tcp://127.0.0.1:1"

    def all_reduce(self, *, rank: int, **unused: Any) -> float:
        if rank == 1 and not self.reduces:
            raise RuntimeError("Gloo connectFullMesh failed: timed out")
        return 0.25


def checks_on(probes: dict[str, NodeProbe], monkeypatch: pytest.MonkeyPatch, **limits: Any) -> dict[str, Check]:
    """All checks of these nodes."""
    actors = {name: Actor(is_silent=False, probe=probe) for name, probe in probes.items()}
    nodes = module._Nodes(actors, workers=list(actors), timeout_s=60)
    monkeypatch.setattr(module, "_probes", lambda timeout_s: contextlib.nullcontext(nodes))
    monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(module.ray, "wait", wait)
    monkeypatch.setattr(module.ray, "get", lambda reference: reference.answer())
    return {check.name: check for check in preflight(Expectations(limits=PreflightConfig(**limits)))}


ENOUGH = {"min_disk": "3GiB", "min_shared_memory": "48MiB", "max_clock_skew_s": 2.0}


def test_nodes_with_just_enough_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = checks_on({"a": FixedProbe(), "b": FixedProbe()}, monkeypatch, **ENOUGH)
    assert {name: check.problem for name, check in checks.items()} == dict.fromkeys(checks)
    assert checks.keys() >= {"disk", "shared memory", "clocks", "all-reduce"}
    assert checks["disk"].detail == "at least 3.0 GiB free"
    assert checks["all-reduce"].detail == "gloo, 2 nodes, 4 MiB in 250 ms"


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("disk", {"disk_free_bytes": 3 * 2**30 - 2**29}, "b: 2.5 GiB free, less than 3.0 GiB"),
        ("shared memory", {"shared_memory_free_bytes": 47 * 2**20}, "b: 47.0 MiB free, less than 48.0 MiB"),
        ("clocks", {"skew_s": 300.0}, r"b: \+(299|300)\.\d\d s"),
        ("clocks", {"skew_s": -300.0}, r"b: -(300|301)\.\d\d s"),
        ("all-reduce", {"reduces": False}, r"b: RuntimeError: Gloo connectFullMesh failed: timed out\nis a firewall.*"),
    ],
)
def test_what_one_node_lacks_is_named(
    name: str, change: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = FixedProbe()
    for attribute, value in change.items():
        setattr(lacking, attribute, value)
    checks = checks_on({"a": FixedProbe(), "b": lacking}, monkeypatch, **ENOUGH)
    assert [check.name for check in checks.values() if not check.passed] == [name]
    assert re.fullmatch(problem, checks[name].problem or "")


def test_a_node_that_nobody_meets_gives_up() -> None:
    """The real sum, of two nodes of which the first is not there."""
    unused_port = free_port()
    with pytest.raises(RuntimeError, match=str(unused_port)):
        NodeProbe().all_reduce(rank=1, world_size=2, url=f"tcp://127.0.0.1:{unused_port}", timeout_s=1.0)
    assert not torch_dist.is_initialized()


def test_the_first_node_may_not_be_there_to_meet_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError("Cannot assign requested address")

    first = FixedProbe()
    monkeypatch.setattr(first, "rendezvous", broken)
    checks = checks_on({"a": first, "b": FixedProbe()}, monkeypatch, **ENOUGH)
    assert checks["all-reduce"].problem == "a: OSError: Cannot assign requested address"


@contextlib.contextmanager
def mlflow_that_answers(*codes: int, authorization: str | None = None) -> Iterator[str]:
    """A server whose ``/health`` is always well, and whose API gives these answers, the last one for ever.

    Who comes without the ``authorization``, if there is one, gets 401.
    """
    left = list(codes)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(HTTPStatus.OK if self.path == "/health" else HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            known = self.headers["Authorization"] == authorization
            self.answer((left.pop(0) if len(left) > 1 else left[0]) if known else HTTPStatus.UNAUTHORIZED)

        def answer(self, code: int) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"{}" if code == HTTPStatus.OK else b"Invalid Host header")

        def log_message(self, *unused: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "words"), [(401, "refuses"), (403, "refuses"), (404, "refuses"), (502, "cannot be reached")]
)
def test_a_node_is_told_what_the_server_makes_of_it(code: int, words: str, mlflow_environment: None) -> None:
    with mlflow_that_answers(code) as uri:
        assert urllib.request.urlopen(f"{uri}/health", timeout=5).status == HTTPStatus.OK
        with pytest.raises(TrackingError, match=words):
            NodeProbe().try_mlflow(uri)


def mlflow_check(uri: str, monkeypatch: pytest.MonkeyPatch) -> Check:
    """By a head that asks first, and one node."""
    monkeypatch.setattr(module.ray, "wait", wait)
    monkeypatch.setattr(module.ray, "get", lambda reference: reference.answer())
    return module._mlflow(module._Nodes({"a": Actor(is_silent=False)}, workers=["a"], timeout_s=60), uri)


def test_a_server_that_refuses_one_node_is_named(mlflow_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with mlflow_that_answers(200, 403) as uri:
        problem = mlflow_check(uri, monkeypatch).problem
    assert problem is not None
    assert problem.startswith(f"a: the MLflow server refuses {uri} ")
    assert "Invalid Host header" in problem
    with mlflow_that_answers(200) as uri:
        assert mlflow_check(uri, monkeypatch).passed
    with mlflow_that_answers(403) as uri:
        assert "from the head: " in (mlflow_check(uri, monkeypatch).problem or "")


def test_a_node_comes_with_its_credentials(mlflow_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with mlflow_that_answers(200, authorization="Bearer of-this-node") as uri:
        with pytest.raises(TrackingError, match="refuses"):
            NodeProbe().try_mlflow(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of-this-node")
        NodeProbe().try_mlflow(uri)


@pytest.mark.parametrize(
    ("output_dir", "spool_dir", "folders"),
    [
        ("runs", None, ["cache"]),
        ("s3://bucket/runs", None, ["cache", spool_root(None)]),
        ("s3://bucket/runs", "/spool", ["cache", "/spool"]),
    ],
)
def test_space_is_looked_for_where_checkpoints_pass_through(
    output_dir: str, spool_dir: str | None, folders: list[str], tmp_path: Path
) -> None:
    values = recipe_values("data", tmp_path, **{"checkpoint.spool_dir": spool_dir or "null"})
    values = {**values, "output_dir": output_dir, "data": {**values["data"], "cache_dir": "cache"}}
    assert module._folders(Expectations(recipe=resolve(values, path="case.yaml"))) == folders
