"""Connecting to Ray: an embedded one for a laptop, or a running cluster by its address."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from raydist.config.schema import ScalingConfig
from raydist.core.errors import CapacityError, ConfigError
from raydist.core.log import quiet_libraries

_CONNECT_TIMEOUT_S = 5.0
_WAITING = frozenset({"PENDING", "PREPARED", "RESCHEDULING"})  # states of a placement group without its place

# Read by Ray in this process and handed on to its controller and workers; a user's own values win.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # after a node's loss Ray first waits so long for what it still believes in
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}


def ray_environment() -> dict[str, str]:
    """What this process tells Ray, for its actors in other processes: the user's own values where there are any."""
    return {key: os.environ.get(key, value) for key, value in RAY_ENVIRONMENT.items()}


@contextmanager
def connected(*, address: str | None, min_cpus: float = 1.0, num_cpus: int | None = None) -> Iterator[None]:
    """A Ray cluster to work on; an embedded one ends with the block, a connection made before stays.

    Args:
        address: ``host:port``, ``ray://...`` or ``auto``; None starts Ray inside this process: dashboard and jobs API on
            loopback, and its other ports, which Ray binds to every interface, behind the token of the user's home; but for the
            one that Prometheus scrapes: Ray shows a node's metrics to whoever asks.
        min_cpus: an embedded Ray offers at least so many logical CPUs, also where the machine has fewer.
        num_cpus: an embedded Ray offers exactly so many; None for those of the machine.

    Raises:
        ConfigError: nobody answers at the address, or the cluster refuses this process.
    """
    os.environ.update(ray_environment())
    quiet_libraries()
    import ray

    if ray.is_initialized():
        yield
        return
    if address is None:
        ray.init(
            address="local",
            num_cpus=num_cpus or max(os.cpu_count() or 1, math.ceil(min_cpus)),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level="ERROR",
        )
    else:
        try:
            _require_listener(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError) as error:  # ConnectionError is an OSError
            raise ConfigError(
                "no Ray cluster answers",
                where=f"--address {address}",
                found=" ".join(str(error).split())[:300],
                fix="check the address, or leave --address away to use a Ray inside this process",
            ) from None
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise ConfigError(
                "the Ray cluster refuses this process",
                where=f"--address {address}",
                found=" ".join(str(error).split())[:300],
                fix="a token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE; else the same Ray and Python as the cluster's",
            ) from None
    quiet_libraries()
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Ray's client ends the whole process where nobody listens, so this asks first.

    Raises:
        OSError: nobody listens at the host and port.
        ValueError: the port is no number.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()


def require_capacity(scaling: ScalingConfig) -> None:
    """Refuses a run that the connected cluster could not hold, which Ray would let wait for ever.

    An elastic run needs room for its fewest workers only.

    Raises:
        CapacityError: with what is asked and what is there.
    """
    import ray

    have, need = ray.cluster_resources(), _need(scaling)
    short = {name: amount for name, amount in need.items() if have.get(name, 0.0) < amount}
    if short:
        raise CapacityError(
            "the Ray cluster is too small for the run",
            where="scaling",
            found=", ".join(f"{have.get(name, 0.0):g} {name}" for name in need),
            expected=", ".join(f"{amount:g} {name}" for name, amount in need.items()),
            fix="lower scaling.num_workers or scaling.cpus_per_worker, or use a larger cluster: --address ...",
        )


def missing_room(scaling: ScalingConfig) -> str | None:
    """What a run of this process waits for in the connected cluster, in words; None if it has its place or can have it."""
    import ray

    free, have, need = ray.available_resources(), ray.cluster_resources(), _need(scaling)
    states = own_placement_groups().values()
    if not _WAITING.intersection(states) and all(have.get(name, 0.0) >= amount for name, amount in need.items()):
        return None
    amounts = (f"{amount:g} {name} of {have.get(name, 0.0):g}" for name, amount in need.items())
    frees = (f"{free.get(name, 0.0):g} {name}" for name in need)
    return f"it needs {', '.join(amounts)}; free: {', '.join(frees)}"


def own_placement_groups() -> dict[str, str]:
    """The placement groups of this Ray job that hold a place in the cluster or wait for one: id and state."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # the end of the id of all that a job makes
    table = placement_group_table()
    return {name: group["state"] for name, group in table.items() if name.endswith(job) and group["state"] != "REMOVED"}


def _need(scaling: ScalingConfig) -> dict[str, float]:
    """By the fewest workers."""
    num_workers = scaling.min_workers or scaling.num_workers
    gpus = {"GPU": float(num_workers)} if scaling.use_gpu else {}
    return {"CPU": num_workers * scaling.cpus_per_worker, **gpus}
