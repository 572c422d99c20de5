"""The commands and environments of the test cluster's servers, run here in their own words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.test_cluster_files import pods
from tests.servers.mlflow_server import MlflowServer
from tests.servers.object_store import ObjectStore

_READ = "/api/2.0/mlflow/experiments/search?max_results=1"
# Given here in another way: where to listen and to store, and one process instead of two.
_PLACES = ("--host", "--port", "--workers", "--artifacts-destination")
_PLACE_NAMES = ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_S3_ENDPOINT_URL")


def plain_environment(container: dict[str, Any]) -> dict[str, str]:
    """What the manifest says itself, without what it takes from secrets."""
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


@pytest.fixture(scope="module")
def manifests_mlflow(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """The address of a server with the environment and the options of the manifest."""
    (container,) = pods()["raydist-mlflow"]["spec"]["containers"]
    program, verb, *words = container["command"]
    assert (program, verb) == ("mlflow", "server")
    options = [word for word in words if word.split("=")[0] not in _PLACES]
    environment = {name: value for name, value in plain_environment(container).items() if name not in _PLACE_NAMES}
    folder = tmp_path_factory.mktemp("manifest")
    shutil.copyfile(empty_database, folder / "server.db")
    with MlflowServer(folder, environment=environment, options=options) as server:
        yield server.url


def answer(url: str, *, host: str) -> int:
    """The status that a client gets who knows the server by this name."""
    request = urllib.request.Request(url, headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.mlflow_server
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("raydist-mlflow:5000", HTTPStatus.OK),
        ("raydist-mlflow.default.svc:5000", HTTPStatus.OK),
        ("raydist-mlflow.default.svc.cluster.local:5000", HTTPStatus.OK),
        ("localhost:18080", HTTPStatus.OK),
        ("127.0.0.1:5000", HTTPStatus.OK),
        ("evil.example", HTTPStatus.FORBIDDEN),
        ("raydist-mlflow.evil.example:5000", HTTPStatus.FORBIDDEN),
        ("127.0.0.1.evil.example", HTTPStatus.FORBIDDEN),
    ],
)
def test_mlflow_answers_to_the_names_that_pods_and_port_forwards_use(
    manifests_mlflow: str, host: str, status: int
) -> None:
    assert answer(manifests_mlflow + _READ, host=host) == status


@pytest.mark.mlflow_server
def test_the_readiness_probe_is_answered_by_whatever_name(manifests_mlflow: str) -> None:
    """A kubelet asks by the pod's address, which is on no list."""
    (container,) = pods()["raydist-mlflow"]["spec"]["containers"]
    path = container["readinessProbe"]["httpGet"]["path"]
    assert answer(manifests_mlflow + path, host="10.1.2.3:5000") == HTTPStatus.OK


def test_a_pod_that_starts_again_finds_its_bucket(object_store: ObjectStore) -> None:
    (container,) = pods()["raydist-mlflow"]["spec"]["initContainers"]
    program, *words = container["command"]
    assert program == "python"
    environment = {**os.environ, **plain_environment(container), **object_store.environment()}
    for _ in range(2):
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    with pytest.raises(Exception, match="BucketAlready"):
        object_store.make_bucket("raydist")


def test_a_pod_without_its_store_does_not_start(object_store: ObjectStore) -> None:
    """What is forgiven is a bucket that exists, and nothing else."""
    (container,) = pods()["raydist-mlflow"]["spec"]["initContainers"]
    environment = {
        **os.environ,
        **plain_environment(container),
        **object_store.environment(),
        **object_store.reader_keys,
    }
    done = subprocess.run(
        [sys.executable, *container["command"][1:]], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "AccessDenied" in done.stderr
