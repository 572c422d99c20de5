"""The state of the code, read from real git repositories."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from raydist.tracking.lineage import lineage_tags, read_source, versions


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, check=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_clean_tree(repository: Path) -> None:
    source = read_source(str(repository))
    assert source.commit == git(repository, "rev-parse", "HEAD")
    assert not source.dirty
    assert lineage_tags(source)["git.dirty"] == "false"


def test_changes_staged_and_not_are_in_the_diff_without_secrets(repository: Path) -> None:
    secret = "hf_" + "abcDEF" * 6
    (repository / "a.py").write_text(f"x = 2\ntoken = '{secret}'\n")
    (repository / "b.py").write_text("new\n")
    git(repository, "add", "b.py")
    source = read_source(str(repository))
    assert source.dirty
    assert "+x = 2" in source.diff
    assert "+new" in source.diff
    assert secret not in source.diff


def test_files_that_are_made_for_secrets_stay_out_of_the_diff(repository: Path) -> None:
    names = [".env", "deep/.env.local", "deep/Prod.ENV", "server.pem", "my-credentials.json", "deep/id_rsa", ".netrc"]
    for name in [*names, "kept.py"]:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("before\n")
    git(repository, "add", "-f", ".")
    git(repository, "commit", "-q", "-m", "second")
    for name in [*names, "kept.py"]:
        (repository / name).write_text("hunter2\n" if name in names else "after\n")
    (repository / "new.env").write_text("hunter2\n")  # not tracked
    diff = read_source(str(repository / "deep")).diff
    assert "hunter2" not in diff
    assert "+after" in diff


def test_an_untracked_file_makes_the_tree_dirty(repository: Path) -> None:
    (repository / "new.py").write_text("y = 1\n")
    source = read_source(str(repository))
    assert source.diff == ""
    assert source.dirty


def test_a_large_diff_is_cut(repository: Path) -> None:
    (repository / "a.py").write_text("é" * (2 << 20))
    diff = read_source(str(repository)).diff
    assert diff.endswith("[cut at 1 MiB]\n")
    assert len(diff.encode()) < (1 << 20) + 100


def test_outside_of_git(tmp_path: Path) -> None:
    source = read_source(str(tmp_path))
    assert source.commit is None
    assert "git.commit" not in lineage_tags(source)


def test_versions_and_the_ray_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    monkeypatch.setenv("RAY_JOB_ID", "02000000")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raydist-a"}}))
    tags = lineage_tags(read_source(str(tmp_path)))
    assert (tags["ray.job_id"], tags["ray.submission_id"]) == ("02000000", "raydist-a")
    assert tags["mlflow.source.type"] == "JOB"
