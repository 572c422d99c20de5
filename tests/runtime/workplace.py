"""A real Ray of three nodes with token authentication, and the command line beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from raydist.runtime.local_ray import LocalRay
from raydist.runtime.status import RunStatus, read_status
from tests.servers.object_store import ObjectStore
from tests.training.cases import recipe_values

PLANTED = "planted-secret-of-the-nodes"
WAIT_S = 300.0
# Enough to be stopped in the middle on a fast machine.
NUM_STEPS = 600
_CHANGES = {"training.num_steps": NUM_STEPS, "training.validate_every_steps": "null", "checkpoint.every_steps": 25}


class Workplace:
    """A cluster, a folder with a recipe and a cluster file, and the command line."""

    def __init__(self, folder: Path, cluster: LocalRay, *, values: dict[str, Any]) -> None:
        self.folder = folder
        self.cluster = cluster
        (folder / "small.yaml").write_text(yaml.safe_dump(values))
        self.write_cluster_file()

    def write_cluster_file(self, **changes: Any) -> None:
        file = {
            "address": self.cluster.jobs_address,
            "env_names": ["NODE_SECRET"],
            "preflight": {"min_disk": "1MiB", "timeout_s": 240},
        }
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump({**file, **changes}))

    def environment(self, **changes: str) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**mine, **self.cluster.client_environment(), **changes}

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "raydist.cli.main", *words, "--json"]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def raydist(self, *words: str, exit_code: int = 0, **environment: str) -> tuple[dict[str, Any], str]:
        """Runs a verb; returns its JSON object and what a person would have read."""
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=WAIT_S)
        assert process.returncode == exit_code, err + out
        assert "Traceback" not in err
        return json.loads(out.strip().splitlines()[-1]), err

    def status(self, run: str) -> RunStatus:
        status = read_status(str(self.folder / "runs" / run))
        return status or RunStatus(name=run, run_dir="")

    def ask(self, path: str) -> bytes:
        """The jobs API itself, with the token."""
        token = Path(self.cluster.client_environment()["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(self.cluster.jobs_address + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


@contextmanager
def workplace(folder: Path, object_store: ObjectStore, *, dataset: str, **changes: Any) -> Iterator[Workplace]:
    """A head without CPUs and two nodes of one, in whose environment a secret is planted."""
    values = recipe_values(dataset, folder / "runs", **{**_CHANGES, **changes})
    values["output_dir"] = "runs"
    nodes_have = {**object_store.environment(), "NODE_SECRET": PLANTED, "XDG_CACHE_HOME": str(folder / "cache")}
    with LocalRay(nodes_have) as cluster:
        cluster.start_head()
        cluster.add_node()
        cluster.add_node()
        yield Workplace(folder, cluster, values=values)
