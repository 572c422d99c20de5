"""Who can talk to a Ray that raydist starts: nobody without its token, and to its pages nobody from outside.

The other servers that it starts listen on this machine only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from raydist.runtime.local_ray import LocalRay
from raydist.runtime.local_servers import mlflow_server, object_store

pytestmark = pytest.mark.ray

_CONNECT = """
import sys, ray
try:
    ray.init(address=sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
    print("connected to", len(ray.nodes()), "node")
except Exception as error:
    print("refused", type(error).__name__, str(error)[:300])
"""


def listening() -> list[tuple[psutil.Process, str, int]]:
    """(process, address, port) of every server among this process's children."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((process, connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def started_since() -> Iterator[Callable[[], set[tuple[str, int]]]]:
    """A function that returns (address, port) of the servers that were started in the block."""
    before = {process.pid for process, _, _ in listening()}
    yield lambda: {(address, port) for process, address, port in listening() if process.pid not in before}


def connect(environment: Mapping[str, str]) -> str:
    import ray

    address = ray.get_runtime_context().gcs_address
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", _CONNECT, address],
        env={**inherited, **environment}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    return done.stdout + (f"ended with {done.returncode}" if done.returncode else "")


def test_dashboard_and_jobs_api_listen_on_loopback_only(ray_cluster: None) -> None:
    from ray._private.worker import get_dashboard_url

    host, port = str(get_dashboard_url()).split(":")
    assert host == "127.0.0.1"
    addresses = {address for _, address, listened in listening() if listened == int(port)}
    assert addresses == {"127.0.0.1"}


@pytest.mark.mlflow_server
def test_the_servers_of_a_demonstration_listen_on_loopback_only(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    with started_since() as servers, object_store(str(tmp_path), bucket="demo") as store:
        of_store = servers()
        with mlflow_server(
            str(tmp_path / "mlflow"), artifacts="s3://demo/artifacts", environment=store.environment
        ) as url:
            of_both = servers()
    assert ("127.0.0.1", urlsplit(store.endpoint).port) in of_store
    assert ("127.0.0.1", urlsplit(url).port) in of_both - of_store
    assert {address for address, _ in of_both} == {"127.0.0.1"}


def test_the_pages_of_a_local_cluster_listen_on_loopback_only() -> None:
    with started_since() as servers, LocalRay() as cluster:
        head = cluster.start_head()
        found = servers()
    assert {address for address, port in found if port == head.dashboard_port} == {"127.0.0.1"}


def test_jobs_api_answers_nobody_without_the_token(ray_cluster: None) -> None:
    from ray._private.worker import get_dashboard_url

    for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
        request = urllib.request.Request(f"http://{get_dashboard_url()}/api/jobs/", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        assert caught.value.code in (401, 403)


def test_the_cluster_takes_no_driver_without_the_token(ray_cluster: None) -> None:
    assert "connected to 1 node" in connect(
        {"RAY_AUTH_MODE": "token"}
    )  # with the token in the home of whoever started it
    assert "connected" not in connect({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    assert "connected" not in connect({"RAY_AUTH_MODE": "disabled"})
