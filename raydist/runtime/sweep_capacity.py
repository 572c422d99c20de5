"""How many trials a cluster holds at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from raydist.config.schema import ScalingConfig
from raydist.core.errors import CapacityError

Nodes = Sequence[Mapping[str, float]]


def alive_nodes() -> list[dict[str, float]]:
    """The resources of each node of the connected cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def embedded_cpus(scaling: ScalingConfig, *, machine_cpus: int) -> float:
    """Logical CPUs that a Ray inside this process must offer for one trial, also where the machine has fewer.

    It grows with the number of workers, so that two of them can be tried on one CPU, as `raydist train` does it. It does not
    grow with what a single worker wants beyond the machine: that one finds no room then, and :func:`require_slots` refuses
    it with the numbers, as on any other cluster.
    """
    return scaling.num_workers * min(scaling.cpus_per_worker, machine_cpus)


def worker_slots(scaling: ScalingConfig, nodes: Nodes) -> int:
    """Workers that fit, each on one node: ``sum over nodes of min(CPUs // CPUs of a worker, GPUs)``."""
    return sum(_slots_of(scaling, node) for node in nodes)


def require_slots(scaling: ScalingConfig, nodes: Nodes, *, where: str) -> int:
    """The worker slots for trials of this scaling.

    Raises:
        CapacityError: not even one trial fits; with what is asked and what is there.
    """
    slots = worker_slots(scaling, nodes)
    if slots >= scaling.num_workers:
        return slots
    kinds = ["CPU", "GPU"] if scaling.use_gpu else ["CPU"]
    there = "; ".join(", ".join(f"{node.get(kind, 0.0):g} {kind}" for kind in kinds) for node in nodes[:4])
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    gpu = " and 1 GPU" if scaling.use_gpu else ""
    raise CapacityError(
        "no trial fits into the Ray cluster",
        where=where,
        found=f"room for {slots} such workers on {len(nodes)} node{'s' if len(nodes) != 1 else ''} ({there}{more})",
        expected=f"{scaling.num_workers} workers of {scaling.cpus_per_worker:g} CPU{gpu}, each on one node",
        fix="lower scaling.num_workers or scaling.cpus_per_worker, or use a larger cluster: --address ...",
    )


def _slots_of(scaling: ScalingConfig, node: Mapping[str, float]) -> int:
    cpus = int((node.get("CPU", 0.0) + 1e-6) // scaling.cpus_per_worker)
    return min(cpus, int(node.get("GPU", 0.0))) if scaling.use_gpu else cpus
