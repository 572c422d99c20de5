"""A cluster on this machine, whole and real, and a node of it killed in the middle of a run: `make cluster-demo`.

Three Ray nodes (a head without CPUs and two with one each), an S3 server, an MLflow server on its database. Data is prepared
into the bucket, the quickstart recipe is submitted as a job with a fraction of its steps, one node dies, another joins, the run
goes on from its newest complete checkpoint, and the trained model is pulled, hash-verified and sampled. Everything lies under
runs/cluster-demo/; every process ends with this one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import yaml

from raydist.cli.main import main as raydist
from raydist.cli.output import say
from raydist.core.errors import RaydistError
from raydist.core.units import format_duration
from raydist.runtime.jobs import JobsApi
from raydist.runtime.local_ray import LocalRay
from raydist.runtime.local_servers import mlflow_server, object_store
from raydist.runtime.status import RunStatus, read_status

RECIPE = "jobs/recipes/quickstart.yaml"
RUN = "cluster-demo"
BUCKET = "raydist"
DATA = f"s3://{BUCKET}/data"
RUNS = f"s3://{BUCKET}/runs"
SECRETS = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"]
_WAIT_S = 600.0
_POLL_S = 0.5


def verb(*words: str) -> None:
    """Shows a command and runs it; a failure ends the demonstration."""
    say(f"\n$ raydist {shlex.join(words)}")
    exit_code = raydist(words)
    if exit_code:
        sys.exit(exit_code)


def chapter(title: str) -> None:
    """A heading."""
    say(f"\n== {title}")


def prepare(work_dir: str) -> None:
    """Two small datasets into the bucket: the character tables of the interpreter's library, and a part of its code."""
    library = sysconfig.get_paths()["stdlib"]
    shared = (
        "--tokenizer",
        "bytes",
        "--include",
        "*.py",
        "--validation-fraction",
        "0.05",
        "--serial",
        "--work-dir",
        work_dir,
    )
    verb("data", "prepare", os.path.join(library, "encodings"), "--out", f"{DATA}/tables", *shared)
    verb("data", "prepare", os.path.join(library, "email"), "--out", f"{DATA}/code", *shared)


def write_cluster_file(path: str, *, jobs_address: str, mlflow_uri: str) -> None:
    """What a user would write once for a cluster; secrets by name only."""
    cluster = {
        "address": jobs_address,
        "output_dir": RUNS,
        "mlflow_uri": mlflow_uri,
        "env_names": SECRETS,
        "overrides": {
            part: [
                {"path": f"{DATA}/tables/{split}", "weight": 3},
                {"path": f"{DATA}/code/{split}", "weight": 1},
            ]
            for part, split in (("data.train", "train"), ("data.validation", "validation"))
        },
        "preflight": {"min_disk": "1GiB", "timeout_s": 180},
    }
    with open(path, "w") as stream:
        yaml.safe_dump(cluster, stream, sort_keys=False)
    say(f"\n$ cat {path}\n{yaml.safe_dump(cluster, sort_keys=False).rstrip()}")


def wait_for(condition: Callable[[RunStatus], bool], *, jobs: JobsApi, what: str) -> RunStatus:
    """Polls the run's status in the bucket until the condition holds."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        status = read_status(f"{RUNS}/{RUN}")
        if status is not None and condition(status):
            return status
        job = jobs.find(RUN)
        if job.has_ended:
            sys.exit(f"the job ended before {what}: {job.status}\n{jobs.log(job.job_id)[-2000:]}")
        time.sleep(_POLL_S)
    sys.exit(f"not within {format_duration(_WAIT_S)}: {what}")


def lose_a_node(cluster: LocalRay, *, at_step: int) -> dict[str, Any]:
    """SIGKILL to all of a node when a checkpoint is complete; a new node joins; returns what it cost."""
    jobs = JobsApi(cluster.jobs_address)
    before = wait_for(lambda now: now.step >= at_step and bool(now.checkpoint_step), jobs=jobs, what="a checkpoint")
    killed_at = time.monotonic()
    cluster.kill(cluster.nodes[1])
    say(f"killed a node with everything on it, at step {before.step}; complete on S3: step {before.checkpoint_step}")
    cluster.add_node()
    say("a new node has joined")
    steps = [before.step]

    def has_restarted(now: RunStatus) -> bool:
        steps.append(now.step if now.attempt == before.attempt else 0)
        return now.attempt > before.attempt

    after = wait_for(has_restarted, jobs=jobs, what="a new start")
    first_step = after.checkpoint_step or 0
    wait_for(lambda now: now.step > first_step, jobs=jobs, what="its first step")
    recovery_s = time.monotonic() - killed_at
    say(f"training again, from step {first_step}: {format_duration(recovery_s)} after the kill")
    return {"killed_at_step": max(steps), "went_on_from_step": first_step, "recovery_s": round(recovery_s, 1)}


def play(folder: str, *, num_steps: int) -> dict[str, Any]:
    """The whole story; returns its facts."""
    started = time.monotonic()
    pulled, cluster_file = os.path.join(folder, "pulled"), os.path.join(folder, "cluster.yaml")
    with ExitStack() as stack:
        chapter("1 of 6  an S3 server, an MLflow server, three Ray nodes")
        store = stack.enter_context(object_store(folder, bucket=BUCKET))
        os.environ.update(store.environment)
        mlflow_uri = stack.enter_context(
            mlflow_server(folder, artifacts=f"s3://{BUCKET}/mlflow", environment=store.environment)
        )
        nodes_have = {**store.environment, "XDG_CACHE_HOME": os.path.join(folder, "cache")}
        cluster = stack.enter_context(LocalRay(nodes_have))
        os.environ.update(cluster.client_environment())
        cluster.start_head()
        cluster.add_node()
        cluster.add_node()
        say(f"S3 {store.endpoint}   MLflow {mlflow_uri}   Ray {cluster.jobs_address}")
        write_cluster_file(cluster_file, jobs_address=cluster.jobs_address, mlflow_uri=mlflow_uri)
        chapter("2 of 6  data, into the bucket")
        prepare(os.path.join(folder, "work"))
        chapter("3 of 6  is the cluster ready?")
        asked = (
            f"name={RUN}",
            f"training.num_steps={num_steps}",
            f"checkpoint.every_steps={max(1, num_steps // 6)}",
            f"training.log_every_steps={max(1, num_steps // 60)}",
        )
        verb("preflight", RECIPE, *asked, "--cluster", cluster_file)
        chapter("4 of 6  the quickstart as a job, and a node that dies")
        verb("submit", RECIPE, *asked, "--cluster", cluster_file)
        facts = lose_a_node(cluster, at_step=num_steps // 3)
        verb("logs", RUN, "--cluster", cluster_file, "--follow")
        chapter("5 of 6  how it ended")
        verb("status", RUN, "--cluster", cluster_file)
        verb("runs", "list", "--mlflow-uri", mlflow_uri, "--experiment", "quickstart")
        chapter("6 of 6  the model: pulled from S3, hash-verified, sampled")
        verb("artifacts", "pull", RUN, "--mlflow-uri", mlflow_uri, "--to", pulled)
        verb("sample", os.path.join(pulled, "model"), "--compare")
        status = read_status(f"{RUNS}/{RUN}")
        assert status is not None
        facts |= {"state": status.state, "step": status.step, "attempts": status.attempt, "loss": status.loss}
    return {**facts, "seconds": round(time.monotonic() - started, 1), "pulled": pulled}


def main() -> None:
    """Plays it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="runs/cluster-demo", help="is emptied first (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, default=300, help="of the recipe's (default: %(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no process is left
    folder = os.path.abspath(args.folder)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    try:
        facts = play(folder, num_steps=args.num_steps)
    except RaydistError as error:
        sys.exit(str(error))
    with open(os.path.join(folder, "facts.json"), "w") as stream:
        json.dump(facts, stream, indent=2)
    lost = facts["killed_at_step"] - facts["went_on_from_step"]
    say(f"\nall done in {format_duration(facts['seconds'])}: {facts['attempts']} attempts, {lost} steps done twice,")
    say(
        f"{format_duration(facts['recovery_s'])} from the kill to the next step; the model is in {facts['pulled']}/model"
    )


if __name__ == "__main__":
    main()
