"""A preflight from outside of the cluster: a short job runs the checks on the head and prints what it found."""

from __future__ import annotations

import json
import uuid
from typing import Any

import yaml

from raydist.config.cluster import ClusterConfig
from raydist.config.load import Recipe, dump_yaml, with_absolute_paths
from raydist.core.errors import ClusterError
from raydist.runtime.job_package import packed
from raydist.runtime.jobs import JobsApi
from raydist.runtime.submit import entrypoint, require_no_secret, runtime_env

_START_ALLOWANCE_S = 300.0  # to install the job's environment and to start its driver
_NUM_CHECKS = 8  # that may each take their whole time
_RECIPE, _CLUSTER = "recipe.yaml", "cluster.yaml"


def preflight_by_job(cluster: ClusterConfig, *, api: JobsApi, recipe: Recipe | None = None) -> dict[str, Any]:
    """Submits the checks, waits for their end, and returns ``{"ready": ..., "checks": [...]}``.

    Raises:
        ConfigError: a value of the recipe looks like a secret.
        ClusterError: the checks could not run at all; says what the job printed.
    """
    files = {_CLUSTER: yaml.safe_dump(cluster.model_dump(mode="json"))}
    words = ["preflight"]
    if recipe is not None:
        require_no_secret(recipe)
        files[_RECIPE] = dump_yaml(with_absolute_paths(recipe.config))
        words.append(_RECIPE)
    job_id = f"raydist-preflight-{uuid.uuid4().hex[:8]}"
    with packed(files, ship_code=cluster.runtime_env.ship_code) as package:
        api.submit(
            job_id=job_id,
            entrypoint=entrypoint(cluster, *words, "--cluster", _CLUSTER, "--json"),
            runtime_env=runtime_env(cluster, working_dir=package.folder),
            metadata={},
        )
    limit_s = _START_ALLOWANCE_S + _NUM_CHECKS * cluster.preflight.timeout_s
    ended = api.wait(job_id, timeout_s=limit_s)
    if ended is None:
        api.stop(job_id)
        raise ClusterError("the checks did not end", where=job_id, expected=f"an end within {limit_s:g} s")
    answer = _answer(api.log(job_id))
    if answer is None:
        message = ended.message or ""
        raise ClusterError(
            "the checks could not run on the cluster's head",
            where=job_id,
            found="\n".join(line[:200] for line in message.strip().splitlines()[-8:]),
            expected=f"raydist, for the interpreter {cluster.python!r} of the head",
            fix="install it in the image, or set runtime_env.ship_code: true in the cluster file",
        )
    return answer


def _answer(log: str) -> dict[str, Any] | None:
    """The JSON object of the log's last line, if it is one of ours."""
    lines = [line for line in log.splitlines() if line.startswith("{")]
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and "checks" in answer else None
