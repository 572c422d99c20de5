"""A real MLflow server on loopback, and a small run configuration."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from raydist.config.schema import RunConfig


class MlflowServer:
    """An `mlflow server` process that a test may freeze, kill and start again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the MLflow server did not start"
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def send_signal(self, number: int) -> None:
        """To the server and its workers, which are a process group of their own."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.send_signal(signal.SIGCONT)
            self.send_signal(signal.SIGKILL)
            self._process.wait()


def make_config(output_dir: Path, **tracking: Any) -> RunConfig:
    """A valid configuration whose tracking section is given."""
    return RunConfig.model_validate(
        {
            "name": "small",
            "output_dir": str(output_dir),
            "model": {},
            "data": {"train": "data/text", "seq_len": 8},
            "objective": {"name": "next_token"},
            "training": {
                "num_steps": 1,
                "batch_rows": 1,
                "microbatch_rows": 1,
                "optimizer": {"learning_rate": 1e-3},
            },
            "tracking": tracking,
        }
    )


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Everything the server has of a metric, in the order of steps."""
    from raydist.tracking.server import connect

    return sorted((metric.step, metric.value) for metric in connect(uri).get_metric_history(run_id, key))
