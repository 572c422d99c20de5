"""The verbs about jobs, against a real Ray of several nodes with token authentication, as a user types them."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.runtime.cutting_proxy import CuttingProxy
from tests.runtime.workplace import NUM_STEPS, PLANTED, WAIT_S, Workplace, workplace
from tests.servers.object_store import ObjectStore
from tests.servers.processes import free_ports, wait_until

pytestmark = pytest.mark.ray

# Prints slowly enough to be cut in the middle, and with characters of several bytes.
_TALKER = "import time\nfor n in range(300):\n    print(f'line {n} é', flush=True)\n    time.sleep(0.03)\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, object_store: ObjectStore, dataset: str) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("place"), object_store, dataset=dataset) as found:
        yield found


def test_a_ready_cluster_is_ready(place: Workplace, object_store: ObjectStore) -> None:
    bucket = object_store.make_bucket("preflight-ready")
    answer, seen = place.raydist(
        "preflight", "small.yaml", f"output_dir={bucket}/runs", "--cluster", "cluster.yaml", "scaling.num_workers=2"
    )
    assert answer["ready"], seen
    assert [check["name"] for check in answer["checks"]] == [
        "nodes", "versions", "environment", "disk", "shared memory", "clocks", "storage", "datasets", "all-reduce"
    ]  # fmt: skip
    assert "3, with 2 CPU" in seen
    assert "gloo, 2 nodes" in seen
    assert seen.strip().splitlines()[-1] == "ready"


def test_submit_attach_watch_stop_and_go_on(place: Workplace) -> None:
    words = ("submit", "small.yaml", "name=long", "--cluster", "cluster.yaml")
    submitted = [place.start(*words) for _ in range(2)]  # at the same time
    answers, said = [], ""
    for process in submitted:
        out, err = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, err
        answers.append(json.loads(out.strip().splitlines()[-1]))
        said += err
    assert re.search(r"^sent +\d+ files?, [\d.]+ (B|KiB)$", said, flags=re.MULTILINE)
    assert [answer["job_id"] for answer in answers] == ["raydist-long"] * 2
    assert sorted(answer["attached"] for answer in answers) == [False, True]

    wait_until(lambda: place.status("long").checkpoint_step is not None, timeout_s=WAIT_S, what="a complete checkpoint")
    stopped, seen = place.raydist("stop", "long", "--cluster", "cluster.yaml")
    assert stopped["status"] == "STOPPED"
    assert "raydist submit RECIPE name=long --cluster cluster.yaml --resume" in seen
    interrupted = place.status("long")
    assert interrupted.state == "interrupted"
    assert 0 < interrupted.step < NUM_STEPS
    assert interrupted.checkpoint_step == interrupted.step  # the stop saved, nothing is done twice
    again, _ = place.raydist("stop", "long", "--cluster", "cluster.yaml")
    assert again["status"] == "STOPPED"

    refused, _ = place.raydist(*words, exit_code=2)
    assert refused["error"] == "ResumeError"
    resumed, _ = place.raydist(*words, "--resume")
    assert resumed["job_id"] == "raydist-long.job2"
    other, _ = place.raydist(*words, f"training.num_steps={NUM_STEPS + 1}", exit_code=2)
    assert "another configuration" in other["what"]
    shown, seen = place.raydist("status", "long", "--cluster", "cluster.yaml")
    assert shown["job"]["status"] in ("PENDING", "RUNNING")
    assert f"of {NUM_STEPS}" in seen or "of ?" in seen
    ended, seen = place.raydist("logs", "long", "--cluster", "cluster.yaml", "--follow")
    assert (ended["job_id"], ended["status"]) == ("raydist-long.job2", "SUCCEEDED")
    assert f"going on at step {interrupted.step} of {NUM_STEPS}" in seen
    status = place.status("long")
    assert (status.state, status.step, status.job_id) == ("finished", NUM_STEPS, "raydist-long.job2")
    assert status.dashboard_url == place.cluster.jobs_address


def test_no_secret_is_in_what_the_cluster_shows_of_jobs(place: Workplace) -> None:
    token = Path(place.cluster.client_environment()["RAY_AUTH_TOKEN_PATH"]).read_text()
    listing = place.ask("/api/jobs/").decode()
    job_ids = [job["submission_id"] for job in json.loads(listing) if job["submission_id"]]
    assert "raydist-long" in job_ids
    logs = "".join(place.ask(f"/api/jobs/{job_id}/logs").decode() for job_id in job_ids)
    status = (place.folder / "runs" / "long" / "status.json").read_text()
    for text in (listing, logs, status):
        assert PLANTED not in text
        assert token not in text


def test_a_log_is_whole_over_cut_connections(place: Workplace, tmp_path: Path) -> None:
    script = tmp_path / "talker.py"
    script.write_text(_TALKER)
    job_id = submit_plainly(place, f"exec python {script}")
    port = int(place.cluster.jobs_address.rsplit(":", 1)[1])
    with CuttingProxy(port) as proxy:
        process = place.start("logs", job_id, "--address", proxy.address, "--follow")
        heard: list[str] = []
        reader = threading.Thread(target=lambda: heard.extend(process.stderr or ()), daemon=True)
        reader.start()
        for number in (40, 120, 200):
            wait_until(partial(has_come, heard, f"line {number} "), timeout_s=WAIT_S, what=f"line {number}")
            assert proxy.cut() > 0
        assert process.wait(WAIT_S) == 0
        reader.join(WAIT_S)
    said = "".join(heard)
    assert said.count("connection lost") >= 3
    told = [line for line in said.splitlines() if line.startswith("line ")]
    assert told == [f"line {number} é" for number in range(300)]


def test_a_connection_that_stays_refused_is_given_up(place: Workplace) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for words in (("logs", "x"), ("stop", "x"), ("status", "x"), ("submit", "small.yaml"), ("preflight",)):
            answer, seen = place.raydist(*words, "--address", address, exit_code=2)
            assert answer["error"] == "ClusterError"
            assert address in seen


def test_a_wrong_token_is_refused_in_our_words(place: Workplace) -> None:
    answer, seen = place.raydist(
        "submit", "small.yaml", "--cluster", "cluster.yaml", exit_code=2, RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN="wrong"
    )
    assert answer["error"] == "ClusterError"
    assert "refuses the token" in seen
    assert "wrong" not in answer["found"]


def test_a_job_that_never_was(place: Workplace) -> None:
    answer, seen = place.raydist("logs", "nobody", "--cluster", "cluster.yaml", exit_code=2)
    assert "no such job" in answer["what"]
    assert "raydist-long" in seen


def test_preflight_finds_what_was_planted(place: Workplace, object_store: ObjectStore, tmp_path: Path) -> None:
    """One node with another torch, a bucket it may only read and a variable less; and an MLflow that is dead."""
    metadata = tmp_path / "site" / "torch-2.12.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    planted = {"PYTHONPATH": str(metadata.parent), **object_store.reader_keys, "NODE_SECRET": ""}
    place.cluster.add_node(environment=planted)
    bucket = object_store.make_bucket("preflight-planted")
    place.write_cluster_file(output_dir=f"{bucket}/runs", mlflow_uri=f"http://127.0.0.1:{free_ports(1)[0]}")

    answer, seen = place.raydist("preflight", "small.yaml", "--cluster", "cluster.yaml", exit_code=2)
    problems = {check["name"]: check["problem"] for check in answer["checks"] if not check["passed"]}
    assert set(problems) == {"versions", "environment", "storage", "MLflow"}
    assert len(problems["versions"].splitlines()) == 1
    assert "torch 2.12.0 instead of 2." in problems["versions"]
    assert "NODE_SECRET not set" in problems["environment"]
    assert len(problems["storage"].splitlines()) == 1
    assert "Access Denied" in problems["storage"]
    assert "from the head" in problems["MLflow"]
    assert seen.strip().splitlines()[-1] == "not ready: versions, environment, storage, MLflow"
    assert PLANTED not in seen


def has_come(lines: Sequence[str], text: str) -> bool:
    return any(text in line for line in lines)


def submit_plainly(place: Workplace, entrypoint: str) -> str:
    """A job that is no training, through the jobs API."""
    code = (
        "import sys; from raydist.runtime.jobs import JobsApi\n"
        "JobsApi(sys.argv[1]).submit(job_id='talker', entrypoint=sys.argv[2], runtime_env={}, metadata={})"
    )
    command = [sys.executable, "-c", code, place.cluster.jobs_address, entrypoint]
    subprocess.run(command, env=place.environment(), check=True, timeout=WAIT_S)
    return "talker"
