"""Secrets are planted where users have them; after a tracked run on Ray none is found in anything that the run left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raydist.config.cluster import ClusterConfig
from raydist.config.load import dump_yaml, load_recipe
from raydist.core.errors import ConfigError
from raydist.runtime.job_package import packed
from raydist.runtime.submit import entrypoint, runtime_env
from tests.servers.mlflow_server import MlflowServer
from tests.training.cases import recipe_values, write_dataset

# Each is unlike anything else, so that finding it is finding the secret.
PLANTS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED01",
    "AWS_SECRET_ACCESS_KEY": "plantedAwsSecretPlantedAwsSecret02",
    "AWS_SESSION_TOKEN": "plantedAwsSessionTokenPlanted03",
    "MLFLOW_TRACKING_USERNAME": "plantedMlflowUser04",
    "MLFLOW_TRACKING_PASSWORD": "plantedMlflowPassword05",
    "HF_TOKEN": "hf_plantedPlantedPlantedPlanted06",
    "GITHUB_TOKEN": "ghp_plantedPlantedPlantedPlanted07",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
}
# In files beside the recipe and in the user's home.
FILED = {
    "project/.env": "PLANTED_IN_ENV_FILE_08",
    "project/notes.py": "plantedInTheSourceOfTheProject09",
    "home/.aws/credentials": "plantedInAwsCredentials10",
    "home/.netrc": "plantedInNetrc11",
}
IN_REMOTE = "plantedInGitRemote12"
IN_COMMENT = "plantedInACommentOfTheRecipe13"


@dataclass(frozen=True)
class FinishedRun:
    """What a run with planted secrets left.

    Attributes:
        folder: with ``runs``, the server's ``mlflow`` and Ray's ``ray``.
        output: of the command.
        result: its last line.
    """

    folder: Path
    output: str
    result: dict[str, Any]


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def plant_files(folder: Path, recipe: str) -> None:
    """A project under git with an uncommitted change, and a home, all with secrets in them."""
    project = folder / "project"
    project.mkdir()
    (project / "notes.py").write_text("x = 1\n")
    (project / ".env").write_text("EMPTY=\n")
    git(project, "init")
    git(project, "add", "--force", ".")
    git(project, "commit", "-m", "first")
    git(project, "remote", "add", "origin", f"https://user:{IN_REMOTE}@git.example/project.git")
    for name, secret in FILED.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f'API_TOKEN = "{secret}"\n' if name.endswith(".py") else f"password={secret}\n"
        path.write_text(text)
    (project / "recipe.yaml").write_text(f"# password: {IN_COMMENT}\n{recipe}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    folder = tmp_path_factory.mktemp("planted")
    dataset = write_dataset(folder)
    ray_folder = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))  # sockets need short paths
    with MlflowServer(folder / "mlflow") as server:
        values = recipe_values(
            dataset, folder / "runs",
            **{
                "tracking.mlflow_uri": server.url, "tracking.system_metrics": "true", "training.num_steps": 4,
                "training.validate_every_steps": 2, "checkpoint.every_steps": 2,
            },
        )  # fmt: skip
        plant_files(folder, json.dumps(values))
        environment = {
            **os.environ, **PLANTS, "HOME": str(folder / "home"), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(ray_folder),
            "OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "raydist.cli.main", "train", "recipe.yaml", "--json"],
            cwd=folder / "project", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=600)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, output[-3000:]
        shutil.copytree(
            ray_folder, folder / "ray", symlinks=True, ignore_dangling_symlinks=True,
            ignore=lambda where, names: [name for name in names if (Path(where) / name).is_socket()],
        )  # fmt: skip
        yield FinishedRun(folder, output, json.loads(output.splitlines()[-1]))
    shutil.rmtree(ray_folder, ignore_errors=True)


def everything_planted() -> list[str]:
    return [*PLANTS.values(), *FILED.values(), IN_REMOTE, IN_COMMENT]


def holders(folder: Path, secrets: Sequence[str]) -> list[str]:
    """Files that hold one of the secrets, compressed or in a database's pages alike as plain bytes."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{path.relative_to(folder)} holds {secret}" for secret in secrets if secret.encode() in content]
    return found


@pytest.mark.ray
@pytest.mark.mlflow_server
def test_run_directory_and_output_hold_no_secret(finished: FinishedRun) -> None:
    runs = finished.folder / "runs"
    written = {str(path.relative_to(runs / "run")) for path in (runs / "run").rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "run.json", "status.json"} <= written
    assert finished.result["step"] == 4
    assert not holders(runs, everything_planted())
    assert not [secret for secret in everything_planted() if secret in finished.output]


@pytest.mark.ray
@pytest.mark.mlflow_server
def test_mlflow_holds_no_secret(finished: FinishedRun) -> None:
    folder = finished.folder / "mlflow"
    artifacts = [path for path in (folder / "artifacts").rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in artifacts)
    diffs = [path for path in artifacts if "notes.py" in path.read_text(errors="replace")]
    assert diffs, "the uncommitted change was tracked, and with it the line of the secret"
    assert (folder / "server.db").stat().st_size > 0
    assert not holders(folder, everything_planted())


@pytest.mark.ray
@pytest.mark.mlflow_server
def test_rays_logs_hold_no_secret(finished: FinishedRun) -> None:
    logs = [path for path in (finished.folder / "ray").rglob("*.log") if path.is_file()]
    assert len(logs) > 3
    assert not holders(finished.folder / "ray", everything_planted())


def test_the_scan_finds_what_is_planted(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/file.bin").write_bytes(b"\x00" + PLANTS["HF_TOKEN"].encode() + b"\xff")
    (tmp_path / "clean").write_text("nothing")
    assert holders(tmp_path, everything_planted()) == [f"deep/file.bin holds {PLANTS['HF_TOKEN']}"]


def test_what_is_sent_with_a_job_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in PLANTS.items():
        monkeypatch.setenv(name, secret)
    plant_files(tmp_path, json.dumps(recipe_values("s3://bucket/data", tmp_path / "runs")))
    recipe = load_recipe(str(tmp_path / "project/recipe.yaml"))
    cluster = ClusterConfig(address="http://127.0.0.1:8265", env_names=["HF_TOKEN", "AWS_SECRET_ACCESS_KEY"])
    with packed({"recipe.yaml": dump_yaml(recipe.config)}, include=[], ship_code=False) as package:
        sent = json.dumps(runtime_env(cluster, working_dir=package.folder)) + entrypoint(
            cluster, "train", "recipe.yaml"
        )
        assert not [secret for secret in everything_planted() if secret in sent]
        assert list(package.sizes) == ["recipe.yaml"]
        assert not holders(Path(package.folder), everything_planted())


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.mlflow_uri=https://me:{PLANTS['MLFLOW_TRACKING_PASSWORD']}@mlflow.example",
        f"tracking.tags.note={PLANTS['AWS_ACCESS_KEY_ID']}",
        f"tracking.tags.hf_token={PLANTS['HF_TOKEN']}",
    ],
)
def test_a_secret_in_the_recipe_is_refused_before_anything_is_written(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from raydist.cli.main import main

    dataset = write_dataset(tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_values(dataset, tmp_path / "runs")))
    assert main(["train", str(tmp_path / "recipe.yaml"), override, "--no-ray"]) == ConfigError.exit_code
    printed = capsys.readouterr()
    assert "secret" in printed.err
    assert not [secret for secret in everything_planted() if secret in printed.out + printed.err]
    assert not holders(tmp_path / "runs", everything_planted())
