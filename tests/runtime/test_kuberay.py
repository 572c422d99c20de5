"""Cluster files rendered for every recipe, against the schemas of KubeRay and of ``ray up``."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raydist.config.load import Recipe, load_recipe
from raydist.core.errors import ConfigError
from raydist.models.presets import PRESETS
from raydist.runtime.kuberay import RECIPE_FILE, dns_label, read_cluster_file, render
from raydist.runtime.kuberay_sizes import GIB, NodeOffer, node_needs, num_parameters, spool_bytes
from tests.runtime.crd_schemas import require_valid

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "jobs/recipes").rglob("*.yaml") if path.name != "base.yaml")
JOBS = ["rayjob_8xh100.yaml", "rayjob_kueue.yaml"]
KUBERAY = [*JOBS, "raycluster_shared.yaml"]
CLUSTERS = [*KUBERAY, "ray_up_aws.yaml"]
EIGHT_H100 = NodeOffer(num_gpus=8, num_cpus=96.0)
_LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
_LABEL_VALUE = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")


def recipe_named(name: str, *overrides: str) -> Recipe:
    return load_recipe(str(ROOT / "jobs/recipes" / f"{name}.yaml"), overrides)


def documents(cluster: str, recipe: Recipe, *, overrides: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The rendered documents by kind."""
    text = render(str(ROOT / "clusters" / cluster), recipe, overrides=overrides)
    return {document.get("kind", "ray up"): document for document in yaml.safe_load_all(text)}


def cluster_spec(rendered: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return rendered["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in rendered else rendered["RayCluster"]["spec"]


def ray_container(template: dict[str, Any]) -> dict[str, Any]:
    return template["spec"]["containers"][0]


def volumes(template: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {volume["name"]: volume for volume in template["spec"]["volumes"]}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("cluster", KUBERAY)
def test_every_recipe_fits_kuberays_schema_with_no_field_dropped(cluster: str, recipe: Path) -> None:
    loaded = load_recipe(str(recipe))
    rendered = documents(cluster, loaded)
    kind = "RayCluster" if "RayCluster" in rendered else "RayJob"
    require_valid(rendered[kind], kind=kind)
    for document in rendered.values():
        assert _LABEL.match(document["metadata"]["name"])
        for key, value in document["metadata"].get("labels", {}).items():
            assert _LABEL_VALUE.match(value), (key, value)
    group = cluster_spec(rendered)["workerGroupSpecs"][0]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    gpus = int(ray_container(group["template"])["resources"]["limits"].get("nvidia.com/gpu", 0))
    scaling = loaded.config.scaling
    if scaling.use_gpu:
        assert group["replicas"] * gpus >= scaling.num_workers > (group["replicas"] - 1) * gpus
    else:
        assert gpus == 0
        assert "nvidia" not in json.dumps(group)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("cluster", JOBS)
def test_pods_read_the_very_recipe_that_the_job_names(cluster: str, recipe: Path, tmp_path: Path) -> None:
    rendered = documents(cluster, load_recipe(str(recipe)))
    job, text = rendered["RayJob"], rendered["ConfigMap"]["data"][RECIPE_FILE]
    copied = tmp_path / RECIPE_FILE
    copied.write_text(text)
    in_pod = load_recipe(str(copied))
    metadata = job["spec"]["metadata"]
    assert metadata["raydist_config_hash"] == in_pod.config_hash
    assert metadata["raydist_run"] == in_pod.config.name
    assert metadata["raydist_run_dir"] == f"{in_pod.config.output_dir}/{in_pod.config.name}"
    assert f"/etc/raydist/{RECIPE_FILE}" in job["spec"]["entrypoint"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    (mount,) = (mount for mount in ray_container(head)["volumeMounts"] if mount["mountPath"] == "/etc/raydist")
    assert volumes(head)[mount["name"]]["configMap"]["name"] == rendered["ConfigMap"]["metadata"]["name"]
    for part in (*in_pod.config.data.train, *in_pod.config.data.validation):
        assert part.path.startswith("s3://raydist/")
    assert str(in_pod.config.checkpoint.spool_dir).startswith("/spool/")
    assert str(in_pod.config.data.cache_dir).startswith("/spool/")


@pytest.mark.parametrize("cluster", JOBS)
def test_a_stopped_job_has_time_to_save(cluster: str, tmp_path: Path) -> None:
    recipe = recipe_named("quickstart", "scaling.stop_grace_s=100.5")
    job = documents(cluster, recipe)["RayJob"]["spec"]
    promised_s = float(job["metadata"]["raydist_stop_grace_s"])
    granted_s = int(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert 100.5 < promised_s <= granted_s < promised_s + 1

    manifest = yaml.safe_load((ROOT / "clusters" / cluster).read_text())
    manifest["spec"]["runtimeEnvYAML"] = "pip: [einops==0.8.0]\nenv_vars: {NCCL_DEBUG: INFO}\n"
    changed = tmp_path / cluster
    changed.write_text(yaml.safe_dump(manifest))
    merged = yaml.safe_load(documents(str(changed), recipe)["RayJob"]["spec"]["runtimeEnvYAML"])
    assert merged == {
        "pip": ["einops==0.8.0"], "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(granted_s), "NCCL_DEBUG": "INFO"}
    }  # fmt: skip
    merging = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))
    for wrong in (
        "a: [",
        "- 1",
        "env_vars: 3",
        "env_vars: [1]",
        "pip: []\npip: []",
        "{}\n---\n{}",
        "a: !!bool x",
        merging,
    ):
        manifest["spec"]["runtimeEnvYAML"] = wrong
        changed.write_text(yaml.safe_dump(manifest))
        with pytest.raises(ConfigError, match="runtime environment cannot be read"):
            documents(str(changed), recipe)


@pytest.mark.parametrize("cluster", KUBERAY)
def test_ray_drains_an_evicted_worker_for_as_long_as_kubernetes_lets_it(cluster: str) -> None:
    group = cluster_spec(documents(cluster, recipe_named("quickstart")))["workerGroupSpecs"][0]
    environment = {variable["name"]: variable["value"] for variable in ray_container(group["template"])["env"]}
    drain_s = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 60 < drain_s < group["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_the_schema_of_ray_up(recipe: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    loaded = load_recipe(str(recipe))
    rendered = documents("ray_up_aws.yaml", loaded)["ray up"]
    with_defaults = prepare_config(copy.deepcopy(rendered))
    validate_config(with_defaults)
    assert not with_defaults["setup_commands"] + with_defaults["head_setup_commands"], (
        "Ray's defaults install a nightly"
    )
    worker = rendered["available_node_types"]["worker"]
    assert worker["min_workers"] == worker["max_workers"] == rendered["max_workers"]
    offered = worker["resources"]["GPU" if loaded.config.scaling.use_gpu else "CPU"]
    assert worker["max_workers"] * offered >= loaded.config.scaling.num_workers
    assert rendered["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert all("RAY_AUTH_MODE=token" in rendered[f"{kind}_start_ray_commands"][1] for kind in ("head", "worker"))


def test_the_validators_refuse_what_an_api_server_would_drop() -> None:
    from ray.autoscaler._private.util import validate_config

    job = documents("rayjob_8xh100.yaml", recipe_named("llama3.1_8b_set_block"))["RayJob"]
    unknown = copy.deepcopy(job)
    unknown["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["shmSize"] = "64g"
    misspelt = copy.deepcopy(job)
    misspelt["spec"]["ttlSecondsAfterFinish"] = misspelt["spec"].pop("ttlSecondsAfterFinished")
    mistyped = copy.deepcopy(job)
    mistyped["spec"]["backoffLimit"] = "none"
    for wrong in (unknown, misspelt, mistyped):
        with pytest.raises(jsonschema.ValidationError):
            require_valid(wrong, kind="RayJob")
    with pytest.raises(jsonschema.ValidationError):
        validate_config({"cluster_name": "x", "provider": {"type": "aws"}, "max_worker": 3})


@pytest.mark.parametrize("cluster", KUBERAY)
def test_head_keeps_its_memory_and_runs_no_worker(cluster: str) -> None:
    spec = cluster_spec(documents(cluster, recipe_named("llama3.1_8b_set_block")))
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    head = ray_container(spec["headGroupSpec"]["template"])["resources"]
    assert head["requests"] == head["limits"]
    assert "nvidia.com/gpu" not in head["limits"]
    assert spec["authOptions"] == {"mode": "token"}
    (ray_pin,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert spec["rayVersion"] == ray_pin
    for template in (spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]):
        container = ray_container(template)
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes(template)[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "sizeLimit" in volumes(template)[mounts["/spool"]]["emptyDir"]
        assert container["envFrom"] == [{"secretRef": {"name": "raydist-storage"}}]
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("cluster", JOBS)
def test_a_job_ends_its_cluster_and_is_never_run_twice(cluster: str) -> None:
    job = documents(cluster, recipe_named("llama3.1_8b_set_block"))["RayJob"]
    spec = job["spec"]
    assert spec["backoffLimit"] == spec["submitterConfig"]["backoffLimit"] == 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert ("kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]) == spec.get("suspend", False)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", ["llama3.1_8b_set_block", "quickstart"])
def test_nothing_of_this_machine_and_no_secret_is_rendered(
    cluster: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "PLANTEDsecretPLANTEDsecret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "PLANTEDtokenPLANTEDtoken")
    text = render(str(ROOT / "clusters" / cluster), recipe_named(name), overrides=())
    assert "PLANTED" not in text
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text


@pytest.mark.parametrize(
    "override", ["tracking.mlflow_uri=https://me:hunter2@mlflow.example", "tracking.tags.api_key=abc"]
)
def test_a_secret_in_the_recipe_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        render(str(ROOT / "clusters/rayjob_8xh100.yaml"), recipe_named("quickstart", override), overrides=[override])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_workers", "min_workers", "expected"),
    [(64, None, (8, 8, 8)), (12, None, (2, 2, 6)), (1, None, (1, 1, 1)), (8, None, (1, 1, 8)), (64, 16, (8, 2, 8))],
)
def test_workers_are_spread_evenly_over_the_fewest_nodes(
    num_workers: int, min_workers: int | None, expected: tuple[int, int, int]
) -> None:
    overrides = [
        "training.microbatch_rows=1",
        f"scaling.num_workers={num_workers}",
        f"training.batch_rows={num_workers}",
    ]
    if min_workers is not None:
        overrides.append(f"scaling.min_workers={min_workers}")
    needs = node_needs(recipe_named("llama3.1_8b_set_block", *overrides).config, EIGHT_H100, where="a file")
    assert (needs.num_nodes, needs.min_nodes, needs.gpus_per_node) == expected


def test_spool_holds_two_checkpoints_and_the_cache() -> None:
    config = recipe_named("llama3.1_8b_set_block").config
    assert num_parameters(config.model) == PRESETS["llama3.1-8b"].num_parameters == 8_030_261_248
    # 2 x 12 B x 1.1 x 8.03e9 / 8 nodes = 24.7 GiB, + 200 GiB
    assert spool_bytes(config, num_nodes=8) == 225 * GIB
    rendered = documents("rayjob_8xh100.yaml", recipe_named("llama3.1_8b_set_block"))
    worker = cluster_spec(rendered)["workerGroupSpecs"][0]["template"]
    assert volumes(worker)["spool"]["emptyDir"]["sizeLimit"] == "225Gi"
    assert ray_container(worker)["resources"]["requests"]["ephemeral-storage"] == "245Gi"
    shrunk = recipe_named("llama3.1_8b_set_block", "scaling.min_workers=8").config
    # all of it on the one node that is left
    assert node_needs(shrunk, EIGHT_H100, where="a file").spool_bytes == 398 * GIB


def test_sizes_are_known_from_the_folders_own_configuration(tmp_path: Path) -> None:
    config = recipe_named("llama3.1_8b_set_block", f"model.init_from={tmp_path}/our-model").config
    with pytest.raises(ConfigError, match="size of the model is not known"):
        num_parameters(config.model)
    folder = tmp_path / "our-model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 8,
                "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                "head_dim": 4, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64,
                "tie_word_embeddings": False, "hidden_act": "silu",
            }
        )
    )  # fmt: skip
    # 2 tables, one block (q, o: 8 x 8; k, v: 8 x 4; three of 8 x 16; two norms), the last norm
    assert num_parameters(config.model) == 2 * 800 + (128 + 64 + 384 + 16) + 8


def test_weights_are_mounted_only_where_they_are_read() -> None:
    with_weights = cluster_spec(documents("rayjob_8xh100.yaml", recipe_named("llama3.1_8b_set_block")))
    without = cluster_spec(documents("rayjob_8xh100.yaml", recipe_named("quickstart")))
    for spec, expected in ((with_weights, True), (without, False)):
        for template in (spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]):
            assert ("weights" in volumes(template)) == expected
            mounts = [mount["name"] for mount in ray_container(template)["volumeMounts"]]
            assert ("weights" in mounts) == expected


@pytest.mark.parametrize(
    "override",
    ["output_dir=/home/me/runs", "data.train=/data/mine", "model.init_from=~/models/Qwen3-8B", "output_dir=../runs"],
)
def test_a_path_that_pods_do_not_have_is_refused(override: str) -> None:
    recipe = recipe_named("quickstart", override)
    with pytest.raises(ConfigError, match="pods of the cluster do not have this path"):
        render(str(ROOT / "clusters/rayjob_8xh100.yaml"), recipe, overrides=[override])


def test_a_path_below_a_volume_of_the_pods_stays() -> None:
    rendered = documents("rayjob_8xh100.yaml", recipe_named("quickstart", "output_dir=/mnt/raydist/runs"))
    assert rendered["RayJob"]["spec"]["metadata"]["raydist_run_dir"] == "/mnt/raydist/runs/quickstart"


@pytest.mark.parametrize("name", ["Quick_Start", "9lives", "a" * 60, "llama3.1-8b", "ünï", "a-", "..."])
def test_any_run_name_becomes_a_label_of_its_own(name: str) -> None:
    label = dns_label(name)
    assert _LABEL.match(label)
    assert len(label) <= 47
    assert label != dns_label(name + "x")
    assert dns_label(label) == label


def test_names_that_are_labels_stay() -> None:
    assert dns_label("quickstart-2") == "quickstart-2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "cannot be read"),
        ("- a", "one document"),
        ("a: 1\n---\nb: 2", "one document"),
        ("kind: Pod", "no cluster file"),
        ("kind: RayJob", "lacks a section"),
        ("{kind: RayCluster, spec: {workerGroupSpecs: [{}, {}]}}", "one group of workers"),
        ("{kind: RayCluster, spec: {workerGroupSpecs: [{template: {spec: {}}}]}}", "no container"),
        ("{cluster_name: a, provider: {}}", "what a worker machine has"),
    ],
)
def test_a_file_that_is_no_cluster_is_one_screen(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        render(str(path), recipe_named("quickstart"), overrides=())


def test_rendering_changes_no_file() -> None:
    before = {name: read_cluster_file(str(ROOT / "clusters" / name)) for name in CLUSTERS}
    for name in CLUSTERS:
        render(str(ROOT / "clusters" / name), recipe_named("quickstart"), overrides=())
    assert before == {name: read_cluster_file(str(ROOT / "clusters" / name)) for name in CLUSTERS}
