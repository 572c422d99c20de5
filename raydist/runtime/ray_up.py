"""Cluster files of ``ray up``, which starts virtual machines."""

from __future__ import annotations

from typing import Any

from raydist.core.errors import ConfigError
from raydist.runtime.kuberay_sizes import GIB, NodeNeeds, NodeOffer

# The operating system and the container image, beside the spool.
_OTHER_DISK_BYTES = 100 * GIB


def is_ray_up(document: dict[str, Any]) -> bool:
    """Whether a YAML mapping is a cluster file of ``ray up``."""
    return "cluster_name" in document and "provider" in document


def ray_up_offer(document: dict[str, Any], *, where: str) -> NodeOffer:
    """What one worker machine has, from the ``resources`` that the file states.

    Raises:
        ConfigError: there is not one type of worker machines that says what it has.
    """
    try:
        resources = worker_type(document)["resources"]
        return NodeOffer(num_gpus=int(resources.get("GPU", 0)), num_cpus=float(resources["CPU"]))
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise ConfigError(
            "the cluster file does not say what a worker machine has",
            where=f"{where}: available_node_types",
            expected="the head's type and one other, with resources: {CPU: 192, GPU: 8}",
        ) from None


def fit_ray_up(document: dict[str, Any], needs: NodeNeeds) -> dict[str, Any]:
    """Sets the number of worker machines and the size of their disk."""
    worker = worker_type(document)
    worker["min_workers"] = worker["max_workers"] = document["max_workers"] = needs.num_nodes
    for device in worker["node_config"].get("BlockDeviceMappings", [])[:1]:
        device["Ebs"]["VolumeSize"] = (needs.spool_bytes + _OTHER_DISK_BYTES) // GIB
    return document


def worker_type(document: dict[str, Any]) -> dict[str, Any]:
    """The machines that are not the head."""
    (worker,) = (kind for name, kind in document["available_node_types"].items() if name != document["head_node_type"])
    return worker
