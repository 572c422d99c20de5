"""A real ``mlflow server`` process on loopback that a test may stop, kill, freeze and start again on the same port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

_START_LIMIT_S = 180.0
_STOP_LIMIT_S = 20.0
# Without the job runner the server is two processes instead of nine.
_QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class MlflowServer:
    """Runs, metrics and the model registry in SQLite; artifacts in a folder or a bucket, proxied by the server.

    A context manager: starts on entry, and leaves no process behind.

    Args:
        folder: of the database, the artifacts and ``server.log``; what is in it survives restarts.
        artifacts: where artifacts go, e.g. ``s3://bucket/prefix``; by default a folder beside the database.
        environment: for the server besides this process's own, e.g. an object store's credentials.
        host: to bind to.
        options: for ``mlflow server`` besides.
    """

    def __init__(
        self,
        folder: Path,
        *,
        artifacts: str | None = None,
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        options: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        self._host = host
        self._options = tuple(options)
        self._artifacts = artifacts or str(folder / "artifacts")
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the server; its process group has the same number."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        assert not self.is_running
        command = [sys.executable, "-m", "mlflow", "server", "--host", self._host, "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", self._artifacts, *self._options]
        inherited = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**inherited, **_QUIET, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_LIMIT_S
        while not self._answers():
            if not self.is_running or time.monotonic() > deadline:
                self.kill()
                raise AssertionError("the MLflow server did not start:\n" + (self.folder / "server.log").read_text())
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends the server as an administrator would, with SIGTERM."""
        if self.is_running:
            assert self._process is not None
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_LIMIT_S)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the server and all its children; silent if it does not run."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Freezes it: connections are accepted by the kernel, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a frozen server go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            assert number in (signal.SIGKILL, signal.SIGTERM), "the server is gone"

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False
