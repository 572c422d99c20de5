"""What travels with a job: the allow-list and nothing else, and never much."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from raydist.config.cluster import ClusterConfig, RuntimeEnvConfig
from raydist.config.load import load_recipe
from raydist.core.errors import ConfigError
from raydist.runtime.job_package import MAX_PACKAGE_BYTES, packed
from raydist.runtime.jobs import JobsApi
from raydist.runtime.preflight_job import preflight_by_job
from raydist.runtime.submit import entrypoint, job_id_of, runtime_env

RECIPE = str(Path(__file__).parents[2] / "jobs" / "recipes" / "quickstart.yaml")


def files_below(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "one.txt").write_text("one")
    (folder / "prompts" / ".env").write_text("AWS_SECRET_ACCESS_KEY=planted")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / "notes.txt").write_text("x")
    monkeypatch.chdir(folder)
    return folder


def test_only_what_is_listed_is_sent(workplace: Path) -> None:
    with packed({"recipe.yaml": "name: x\n"}, include=["prompts/*"]) as package:
        assert files_below(package.folder) == {"recipe.yaml", "prompts/one.txt"}
        assert package.sizes == {"recipe.yaml": 8, "prompts/one.txt": 3}
        assert package.size_bytes == 11
        folder = package.folder
    assert not os.path.exists(folder)


def test_the_code_is_whole_and_only_code(workplace: Path) -> None:
    with packed({}, ship_code=True) as package:
        sent = files_below(package.folder)
    assert {"raydist/cli/main.py", "raydist/training/loop.py", "data_loaders/loader.py"} <= sent
    assert all(name.endswith((".py", ".typed")) for name in sent)


def test_too_much_is_refused_with_the_ten_largest(workplace: Path) -> None:
    for number in range(12):
        (workplace / f"part-{number:02}.bin").write_bytes(b"\0" * (MAX_PACKAGE_BYTES // 12 + number * 1024))
    with pytest.raises(ConfigError) as caught, packed({}, include=["part-*"]):
        pass
    text = str(caught.value)
    assert "20.1 MiB in 12 files" in text
    assert [f"part-{number:02}.bin" in text for number in (0, 1, 2, 11)] == [False, False, True, True]


def test_nothing_from_elsewhere(workplace: Path) -> None:
    (workplace.parent / "outside.txt").write_text("x")
    (workplace / "link.txt").symlink_to(workplace.parent / "outside.txt")
    with pytest.raises(ConfigError, match="elsewhere"), packed({}, include=["link.txt"]):
        pass
    with pytest.raises(ConfigError, match="no file to send"), packed({}, include=["nothing-*.txt"]):
        pass


def test_the_entrypoint_is_the_process_that_gets_the_signal() -> None:
    cluster = ClusterConfig(address="http://h:1", python="/opt/my env/bin/python")
    assert entrypoint(cluster, "train", "a b.yaml") == (
        "exec '/opt/my env/bin/python' -m raydist.cli.main train 'a b.yaml' --address auto"
    )


def test_the_runtime_env_holds_the_grace_and_no_values_of_names() -> None:
    environment = RuntimeEnvConfig(pip=["einops==0.8.0"], image_uri="docker.io/x:1")
    cluster = ClusterConfig(address="http://h:1", env={"A": "1"}, env_names=["HF_TOKEN"], runtime_env=environment)
    assert runtime_env(cluster, working_dir="/w", grace_s=90) == {
        "working_dir": "/w",
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90", "A": "1"},
        "pip": ["einops==0.8.0"],
        "image_uri": "docker.io/x:1",
    }


def test_ids_follow_from_names() -> None:
    assert job_id_of("quick.start") == "raydist-quick.start"
    assert job_id_of("x", number=3) == "raydist-x.job3"


def test_no_two_runs_share_an_id() -> None:
    names = ["x", "x.job2", "x.job3", "é", "ü", "-", "a b", "a-b", "a/b"]
    ids = [job_id_of(name, number=number) for name in names for number in (1, 2, 3)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"raydist-[A-Za-z0-9_.-]+", job_id) for job_id in ids)


def test_a_preflight_sends_no_secret_of_the_recipe() -> None:
    recipe = load_recipe(RECIPE, ["tracking.mlflow_uri=http://user:planted@m:5000"])
    api = object.__new__(JobsApi)  # connected to nothing
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        preflight_by_job(ClusterConfig(address="http://h:1"), api=api, recipe=recipe)
    assert caught.value.where == "tracking.mlflow_uri"
    assert "planted" not in str(caught.value)
