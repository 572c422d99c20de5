"""An S3 server (SeaweedFS) and an MLflow server on this machine's loopback, for demonstrations."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from raydist.core import storage
from raydist.core.errors import ClusterError
from raydist.runtime.local_ray import free_port

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 15.0
_WEED_PORTS = ("s3.port", "filer.port", "master.port", "volume.port", "admin.port")
_GRPC_OFFSET = 10_000  # SeaweedFS takes each port + 10000 too


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server.

    Attributes:
        endpoint: its address.
        environment: what clients need: endpoint, keys made for this server, region.
    """

    endpoint: str
    environment: dict[str, str]


@contextmanager
def object_store(folder: str, *, bucket: str) -> Iterator[ObjectStore]:
    """SeaweedFS with one bucket, until the block ends.

    Raises:
        ClusterError: it is not installed or does not start.
    """
    beside = os.path.join(os.path.dirname(sys.executable), "weed")
    program = beside if os.path.exists(beside) else shutil.which("weed")
    if program is None:
        raise ClusterError("there is no S3 server to start", expected="weed", fix="pip install 'raydist[demo]'")
    ports = {name: _free_pair() for name in _WEED_PORTS}
    endpoint = f"http://{_HOST}:{ports['s3.port']}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "MLFLOW_S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    data = os.path.join(folder, "objects")
    os.makedirs(data, exist_ok=True)
    command = [
        program, "mini", f"-dir={data}", f"-ip={_HOST}", f"-ip.bind={_HOST}", f"-bucket={bucket}",
        "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-volume.max=64", "-master.volumeSizeLimitMB=256",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with _process(command, environment=environment, log=os.path.join(folder, "weed.log"), url=endpoint):
        yield ObjectStore(endpoint, environment)


@contextmanager
def mlflow_server(folder: str, *, artifacts: str, environment: Mapping[str, str]) -> Iterator[str]:
    """An MLflow server on an SQLite database with its artifacts in ``artifacts``, until the block ends; yields its address.

    Raises:
        ClusterError: it does not start.
    """
    port = free_port()
    url = f"http://{_HOST}:{port}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", artifacts,
    ]  # fmt: skip
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = os.path.join(folder, "mlflow.log")
    with _process(command, environment={**quiet, **environment}, log=log, url=f"{url}/health"):
        yield url


@contextmanager
def _process(command: Sequence[str], *, environment: Mapping[str, str], log: str, url: str) -> Iterator[None]:
    """A process group that lives as long as the block, from when it answers at ``url``."""
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        _wait_for_answer(process, command=command, log=log, url=url)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_answer(process: subprocess.Popen[bytes], *, command: Sequence[str], log: str, url: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            words = storage.read_bytes(log).decode(errors="replace").strip().splitlines()[-5:]
            raise ClusterError("a server did not start", where=os.path.basename(command[0]), found="\n".join(words))
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether a server listens there; a refusal for want of credentials is an answer too."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as answer:
        return answer.code == 403
    except OSError:
        return False
    return True


def _free_pair() -> int:
    while True:
        port = free_port()
        if port + _GRPC_OFFSET < 65536:
            return port
