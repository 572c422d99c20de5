"""Cluster files: strict, without secrets, and in the right order over a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydist.config.cluster import cluster_at, is_manifest, load_cluster, looks_secret, recipe_overrides
from raydist.config.load import load_recipe
from raydist.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "jobs" / "recipes" / "quickstart.yaml")


def written(folder: Path, text: str) -> str:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return str(path)


def test_the_example_loads() -> None:
    cluster = load_cluster(str(ROOT / "clusters" / "local.yaml"))
    assert cluster.address == "http://127.0.0.1:8265"
    assert cluster.env_names == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "YAML mapping"),
        ("- 1", "YAML mapping"),
        ("a: [", "cannot be read"),
        ("output_dir: x", "address"),
        ("address: http://h:1\nadress: x", "address"),
        ("address: h:8265", "http://host:port"),
        ("address: http://user:pass@h:1", "without user and password"),
        ("address: http://h:99999", "http://host:port"),
        ("address: http://h:1\nenv: {WANDB_API_KEY: x}", "env_names"),
        ("address: http://h:1\nenv: {PLAIN: AKIAABCDEFGHIJKLMNOP}", "env_names"),
        ("address: http://h:1\nenv_names: ['A=secret']", "without values"),
        ("address: http://h:1\nruntime_env: {pip: [torch]}", "pinned"),
        ("address: http://h:1\nruntime_env: {include: [../x]}", "below the folder"),
        ("address: http://h:1\npreflight: {min_disk: much}", "not a size"),
        ("address: http://h:1\nmlflow_uri: http://user:pass@m:5000", "mlflow_uri looks like a secret"),
        ("address: http://h:1\noutput_dir: s3://user:pass@b/runs", "output_dir looks like a secret"),
        ("address: http://h:1\nruntime_env: {image_uri: docker://user:pass@r/x}", "runtime_env.image_uri looks like"),
        (
            "address: http://h:1\nruntime_env: {pip: ['a==1', 'x @ https://user:pass@h/x']}",
            "runtime_env.pip.1 looks like",
        ),
        ("address: http://h:1\noverrides: {data.train: [{path: AKIAABCDEFGHIJKLMNOP}]}", "overrides.data.train.0.path"),
        ("address: http://h:1\n---\naddress: http://h:2", "2 documents"),
        (
            f"address: http://h:1\noverrides:\n  a: &a [{'1, ' * 99}]\n  b: &b [{'*a, ' * 99}]\n  c: [{'*b, ' * 99}]",
            "too large",
        ),
        ("address: http://h:1\naddress: http://h:2", "the key 'address' is given twice"),
        ("address: http://h:1\nenv: {A: x, A: y}", "the key 'A' is given twice"),
        ("apiVersion: ray.io/v1\nkind: RayCluster", "--address"),
    ],
)
def test_a_mistake_names_the_key(text: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert says in str(caught.value)
    assert path in str(caught.value)


def test_a_refused_secret_is_not_repeated(tmp_path: Path) -> None:
    for text in ("env: {MY_TOKEN: planted-value}", "mlflow_uri: http://user:planted-value@m"):
        with pytest.raises(ConfigError) as caught:
            load_cluster(written(tmp_path, f"address: http://h:1\n{text}"))
        assert "planted-value" not in str(caught.value)


def test_manifests_are_recognised_and_need_an_address(tmp_path: Path) -> None:
    manifest = written(tmp_path, "apiVersion: v1\nkind: Secret\n---\napiVersion: ray.io/v1\nkind: RayCluster")
    assert is_manifest(manifest)
    assert not is_manifest(str(ROOT / "clusters" / "local.yaml"))
    assert load_cluster(manifest, address="http://h:8265/").address == "http://h:8265"


def test_an_address_alone_is_a_cluster() -> None:
    assert cluster_at("https://ray.example.org").address == "https://ray.example.org"
    with pytest.raises(ConfigError, match="not the address"):
        cluster_at("ray://h:10001")


def test_the_recipe_is_overridden_by_the_cluster_and_that_by_the_user(tmp_path: Path) -> None:
    cluster = load_cluster(
        written(
            tmp_path,
            "address: http://h:1\noutput_dir: s3://b/runs\nmlflow_uri: http://m:5000\n"
            "overrides: {scaling.num_workers: 1, seed: 3, data.train: [{path: s3://b/d, weight: 2}]}",
        )
    )
    config = load_recipe(RECIPE, recipe_overrides(cluster, ["seed=5"])).config
    assert (config.output_dir, config.tracking.mlflow_uri) == ("s3://b/runs", "http://m:5000")
    assert [(part.path, part.weight) for part in config.data.train] == [("s3://b/d", 2.0)]
    assert (config.scaling.num_workers, config.seed) == (1, 5)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("HF_TOKEN", "x", True),
        ("DB_PASSWORD", "x", True),
        ("X", "hf_abcdefghijklmnopqrstuvwxyz", True),
        ("X", "postgresql://user:pass@host/db", True),
        ("OMP_NUM_THREADS", "1", False),
        ("RAY_AUTH_MODE", "token", False),
        ("GITHUB_TOKEN_FILE_CONTENT", "x", True),
        ("SECRET_TOKENS", "x", True),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("MAX_TOKENS", "1", False),
        ("MAX_TOKENS_PER_STEP", "1", False),
        ("NCCL_SOCKET_IFNAME", "eth0", False),
        ("X", "http://host:5000/path@version", False),
    ],
)
def test_what_looks_like_a_secret(name: str, value: str, secret: bool) -> None:
    assert looks_secret(name, value) is secret
