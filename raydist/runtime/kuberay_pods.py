"""Edits of the pod templates in a KubeRay manifest."""

from __future__ import annotations

import re
from typing import Any

from raydist.config.schema import RunConfig
from raydist.core.errors import ConfigError
from raydist.runtime.kuberay_sizes import GIB, NodeNeeds, NodeOffer, node_needs

GPU = "nvidia.com/gpu"
SPOOL_VOLUME = "spool"
_RECIPE_VOLUME = "recipe"
_DISK = "ephemeral-storage"
# Logs of Ray and the container's own writes, beside the spool.
_OTHER_DISK_BYTES = 20 * GIB
_CPUS = re.compile(r"^(\d+(?:\.\d+)?)(m?)$")


def container_of(template: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The Ray container, which KubeRay takes to be the first.

    Raises:
        ConfigError: there is none.
    """
    try:
        container = template["spec"]["containers"][0]
        if isinstance(container, dict):
            return container
    except (KeyError, IndexError, TypeError):
        pass
    raise ConfigError("a pod template has no container", where=where, expected="template.spec.containers: [...]")


def fit_worker_group(group: dict[str, Any], config: RunConfig, *, where: str) -> NodeNeeds:
    """Sets replicas, GPUs and local disk of the workers' group.

    Raises:
        ConfigError: the group lacks what is to be set, or a worker does not fit on its nodes.
    """
    where = f"{where}: workerGroupSpecs.0"
    template = group.get("template")
    if not isinstance(template, dict):
        raise ConfigError("the cluster file lacks a section", where=where, expected="template: a mapping")
    container = container_of(template, where=where)
    resources = container.get("resources") or {}
    if not all(isinstance(resources.get(kind), dict) for kind in ("requests", "limits")):
        raise ConfigError(
            "the workers' container does not say what it takes",
            where=where,
            expected="resources with requests and limits of cpu, memory and, for GPUs, nvidia.com/gpu",
        )
    limits = resources["limits"]
    offer = NodeOffer(num_gpus=_whole(limits.get(GPU, 0), where=where), num_cpus=_cpus(limits.get("cpu"), where=where))
    needs = node_needs(config, offer, where=where)
    group.update(replicas=needs.num_nodes, minReplicas=needs.min_nodes, maxReplicas=needs.num_nodes)
    _set_spool(template, needs, where=where)
    for kind in ("requests", "limits"):
        resources[kind][_DISK] = _gibibytes(needs.spool_bytes + _OTHER_DISK_BYTES)
        resources[kind].pop(GPU, None)
        if needs.gpus_per_node:
            resources[kind][GPU] = str(needs.gpus_per_node)
    if not needs.gpus_per_node:
        _release_from_gpu_nodes(template["spec"])
    return needs


def mount_recipe(template: dict[str, Any], *, config_map: str, folder: str, where: str) -> None:
    """Makes a ConfigMap a read-only folder of the pod's Ray container."""
    container = container_of(template, where=where)
    container.setdefault("volumeMounts", []).append({"name": _RECIPE_VOLUME, "mountPath": folder, "readOnly": True})
    template["spec"].setdefault("volumes", []).append({"name": _RECIPE_VOLUME, "configMap": {"name": config_map}})


def mount_of(template: dict[str, Any], volume: str, *, where: str) -> str:
    """The folder at which the Ray container sees a volume.

    Raises:
        ConfigError: it does not mount it.
    """
    for mount in container_of(template, where=where).get("volumeMounts", []):
        if mount.get("name") == volume:
            return str(mount["mountPath"])
    raise ConfigError(
        "the workers' container does not mount a volume",
        where=f"{where}: volumeMounts",
        expected=f"- {{name: {volume}}}",
    )


def has_volume(template: dict[str, Any], name: str) -> bool:
    """Whether the pod has a volume of this name."""
    return any(volume["name"] == name for volume in template["spec"].get("volumes", []))


def remove_volume(template: dict[str, Any], name: str, *, where: str) -> None:
    """Takes a volume out of the pod, for a run that has no use for it and a cluster that may not have it."""
    container = container_of(template, where=where)
    container["volumeMounts"] = [mount for mount in container.get("volumeMounts", []) if mount["name"] != name]
    template["spec"]["volumes"] = [volume for volume in template["spec"]["volumes"] if volume["name"] != name]


def _set_spool(template: dict[str, Any], needs: NodeNeeds, *, where: str) -> None:
    for volume in template["spec"].get("volumes", []):
        if volume.get("name") == SPOOL_VOLUME and isinstance(volume.get("emptyDir"), dict):
            volume["emptyDir"]["sizeLimit"] = _gibibytes(needs.spool_bytes)
            return
    raise ConfigError(
        "the workers have no local disk for checkpoints and data",
        where=f"{where}.template.spec.volumes",
        expected=f"- {{name: {SPOOL_VOLUME}, emptyDir: {{sizeLimit: 1Gi}}}}",
    )


def _release_from_gpu_nodes(pod: dict[str, Any]) -> None:
    """A run on CPU shall neither wait for nor occupy a node with GPUs."""
    selector = {key: value for key, value in pod.get("nodeSelector", {}).items() if not key.startswith("nvidia.com/")}
    tolerations = [item for item in pod.get("tolerations", []) if item.get("key") != GPU]
    for key, value in (("nodeSelector", selector), ("tolerations", tolerations)):
        if value:
            pod[key] = value
        else:
            pod.pop(key, None)


def _whole(value: Any, *, where: str) -> int:
    if str(value).isdigit():
        return int(value)
    raise ConfigError("not a number of GPUs", where=where, found=repr(value), expected="a whole number")


def _cpus(value: Any, *, where: str) -> float:
    match = _CPUS.match(str(value))
    if match is None:
        raise ConfigError("not a number of CPUs", where=where, found=repr(value), expected="limits.cpu: 16 or 500m")
    return float(match.group(1)) / (1000 if match.group(2) else 1)


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes // GIB}Gi"
