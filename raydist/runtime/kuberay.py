"""Cluster files for KubeRay and ``ray up``, filled in for a recipe.

A cluster file is a manifest that people read and own; rendering changes the few places that follow from the recipe, as a
tree and not as text. ``clusters/README.md`` lists them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from raydist.config.load import Recipe, dump_yaml, identity_hash
from raydist.config.yaml_limits import parse_documents, read_documents
from raydist.core import storage
from raydist.core.errors import ConfigError
from raydist.runtime.jobs import CONFIG_HASH_KEY, NUMBER_KEY, RUN_DIR_KEY, RUN_KEY, STOP_GRACE_KEY
from raydist.runtime.kuberay_paths import Roots, in_cluster, needs_weights, on_spool
from raydist.runtime.kuberay_pods import (
    SPOOL_VOLUME,
    container_of,
    fit_worker_group,
    has_volume,
    mount_of,
    mount_recipe,
    remove_volume,
)
from raydist.runtime.kuberay_sizes import NodeNeeds, node_needs
from raydist.runtime.ray_up import fit_ray_up, is_ray_up, ray_up_offer
from raydist.runtime.submit import GRACE_VARIABLE, job_id_of, stop_grace_s
from raydist.tracking.params import flat_params

RECIPE_FOLDER = "/etc/raydist"
RECIPE_FILE = "recipe.yaml"
_WEIGHTS_VOLUME = "weights"
# KubeRay appends suffixes to a RayJob's name and refuses names above this.
_MAX_NAME_CHARS = 47
_HASH_CHARS = 8


def render(cluster_file: str, recipe: Recipe, *, overrides: Sequence[str]) -> str:
    """The cluster file for one recipe, as YAML documents to ``kubectl apply``, or the one that ``ray up`` takes.

    Args:
        cluster_file: a RayJob or RayCluster of KubeRay, or a cluster file of ``ray up``.
        recipe: the resolved recipe, overrides included.
        overrides: the ``key=value`` words it was resolved with; written down in an annotation.

    Raises:
        ConfigError: the file is none of these, a worker does not fit on its nodes, the recipe has a path that pods cannot
            reach, or a value looks like a secret.
    """
    flat_params(recipe.config.model_dump(mode="json"))
    flat_params({f"override {index}": word for index, word in enumerate(overrides)})
    document = read_cluster_file(cluster_file)
    if is_ray_up(document):
        needs = node_needs(recipe.config, ray_up_offer(document, where=cluster_file), where=cluster_file)
        return _dump([fit_ray_up(document, needs)])
    kind = document.get("kind")
    if kind == "RayCluster":
        return _dump([_ray_cluster(document, recipe, where=cluster_file)])
    if kind == "RayJob":
        return _dump(_ray_job(document, recipe, overrides=overrides, where=cluster_file))
    raise ConfigError(
        "this is no cluster file",
        where=cluster_file,
        found=f"kind: {kind}",
        expected="a RayJob or RayCluster (apiVersion: ray.io/v1), or a file for `ray up`",
        fix="ls clusters shows the files that come along",
    )


def read_cluster_file(path: str) -> dict[str, Any]:
    """The one YAML document of a cluster file.

    Raises:
        ConfigError: it is missing, no YAML, or not one mapping.
    """
    documents = read_documents(path)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ConfigError(
            "a cluster file holds one document",
            where=path,
            found=f"{len(documents)} documents" if len(documents) != 1 else type(documents[0]).__name__,
            expected="one mapping of keys",
        )
    return documents[0]


def dns_label(name: str, *, max_chars: int = _MAX_NAME_CHARS) -> str:
    """A run's name as Kubernetes allows it: lower-case letters, digits and dashes, starting with a letter.

    A name that has to be changed gets a hash of the original, so that two runs never share one.
    """
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if label == name and len(label) <= max_chars and label[0].isalpha():
        return label
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH_CHARS]
    stem = label if label[:1].isalpha() else f"run-{label}"
    return f"{stem[: max_chars - _HASH_CHARS - 1].strip('-')}-{digest}"


def _ray_cluster(document: dict[str, Any], recipe: Recipe, *, where: str) -> dict[str, Any]:
    """A shared cluster keeps its name; jobs come later, through its jobs API."""
    _fit(_section(document, "spec", where=where), recipe, where=where)
    return document


def _ray_job(document: dict[str, Any], recipe: Recipe, *, overrides: Sequence[str], where: str) -> list[dict[str, Any]]:
    """The job with its cluster, and the recipe as a ConfigMap that the head mounts.

    The job goes on with a run of its name and configuration, so applying the manifest again after a lost cluster is enough.
    """
    spec = _section(document, "spec", where=where)
    cluster = _section(spec, "rayClusterSpec", where=f"{where}: spec")
    head = _section(_section(cluster, "headGroupSpec", where=where), "template", where=where)
    metadata = document.setdefault("metadata", {})
    mounts = [mount["mountPath"] for mount in container_of(head, where=where).get("volumeMounts", [])]
    roots = Roots.of(metadata.get("annotations") or {}, mounts=mounts, where=where)
    needs = _fit(cluster, recipe, where=where)
    spool = mount_of(cluster["workerGroupSpecs"][0]["template"], SPOOL_VOLUME, where=where)
    config = on_spool(in_cluster(recipe.config, roots), spool)
    if not needs_weights(config, roots):
        for template in (head, *(group["template"] for group in cluster["workerGroupSpecs"])):
            if has_volume(template, _WEIGHTS_VOLUME):
                remove_volume(template, _WEIGHTS_VOLUME, where=where)

    run = config.name or ""
    name = dns_label(run)
    config_map = f"{name}-recipe"
    mount_recipe(head, config_map=config_map, folder=RECIPE_FOLDER, where=where)
    metadata["name"] = name
    metadata.setdefault("labels", {})["raydist/run"] = name
    metadata["annotations"].update(
        {
            "raydist/run": run,
            "raydist/overrides": " ".join(overrides),
            "raydist/workers": f"{config.scaling.num_workers}, at most {needs.workers_per_node} on a node",
        }
    )
    spec["jobId"] = job_id_of(run)
    spec["metadata"] = {
        RUN_KEY: run,
        RUN_DIR_KEY: storage.join(config.output_dir, run),
        CONFIG_HASH_KEY: identity_hash(config),
        NUMBER_KEY: "1",
        STOP_GRACE_KEY: f"{stop_grace_s(config):g}",
    }
    spec["runtimeEnvYAML"] = _with_grace(spec.get("runtimeEnvYAML", ""), grace_s=stop_grace_s(config), where=where)
    spec["entrypoint"] = f"exec raydist train {RECIPE_FOLDER}/{RECIPE_FILE} --address auto --resume-or-start"
    recipe_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_map,
            "labels": dict(metadata["labels"]),
            **({"namespace": metadata["namespace"]} if "namespace" in metadata else {}),
        },
        "data": {RECIPE_FILE: dump_yaml(config)},
    }
    return [recipe_map, document]


def _fit(cluster: dict[str, Any], recipe: Recipe, *, where: str) -> NodeNeeds:
    groups = cluster.get("workerGroupSpecs")
    if not isinstance(groups, list) or len(groups) != 1:
        raise ConfigError(
            "a cluster file has one group of workers",
            where=f"{where}: workerGroupSpecs",
            found=f"{len(groups)} groups" if isinstance(groups, list) else "none",
            expected="one: all workers of a run are alike",
        )
    return fit_worker_group(groups[0], recipe.config, where=where)


def _with_grace(runtime_env: Any, *, grace_s: float, where: str) -> str:
    """The job's runtime environment with the time that Ray gives its driver after a stop; a value of the file's own wins.

    Raises:
        ConfigError: the file's is no YAML mapping, or its variables are none.
    """
    where = f"{where}: spec.runtimeEnvYAML"
    try:
        (environment,) = parse_documents(str(runtime_env), where=where) or [None]
        environment = environment or {}
        variables = environment.get("env_vars") or {}
        environment["env_vars"] = {GRACE_VARIABLE: str(math.ceil(grace_s)), **variables}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        found = " ".join(str(error).split())[:300]
        raise ConfigError(
            "the runtime environment cannot be read", where=where, found=found, expected="text of a YAML mapping"
        ) from None
    return yaml.safe_dump(environment, sort_keys=False)


def _section(document: dict[str, Any], key: str, *, where: str) -> dict[str, Any]:
    section = document.get(key)
    if not isinstance(section, dict):
        raise ConfigError("the cluster file lacks a section", where=where, expected=f"{key}: a mapping")
    return section


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, lists indented."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _dump(documents: Sequence[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)
