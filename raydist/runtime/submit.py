"""A recipe to a cluster, as one Ray job that needs this machine no longer."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
from dataclasses import dataclass

from raydist import __version__
from raydist.config.cluster import ClusterConfig, looks_secret
from raydist.config.load import Recipe, dump_yaml, flatten, identity_hash, with_absolute_paths
from raydist.config.schema import RunConfig
from raydist.core.errors import ConfigError, ResumeError
from raydist.runtime.job_package import packed
from raydist.runtime.jobs import CONFIG_HASH_KEY, NUMBER_KEY, RUN_DIR_KEY, RUN_KEY, STOP_GRACE_KEY, Job, JobsApi
from raydist.training.run_dir import run_dir_of

_PREFIX = "raydist-"
# Read by Ray where the job's driver runs: how long that may take after SIGTERM. Longer than the driver gives its workers for
# their last save, so that it can still close the run.
GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_CLOSING_S = 60.0
_HASH_CHARS = 8


@dataclass(frozen=True)
class Submission:
    """What a submit did.

    Attributes:
        job_id: the job of the run.
        attached: it was there already and nothing was sent.
        run_dir: as the nodes name it.
        num_files: sent with the job.
        size_bytes: of those files.
    """

    job_id: str
    attached: bool
    run_dir: str
    num_files: int = 0
    size_bytes: int = 0


def submit_run(recipe: Recipe, *, cluster: ClusterConfig, api: JobsApi, resume: bool = False) -> Submission:
    """Starts the job of a run, or attaches to the one that runs.

    The submission id follows from the run's name, and the cluster accepts an id once: however often and from wherever a run
    is submitted, it has one job at a time.

    Args:
        recipe: resolved, with the cluster's overrides.
        cluster: where to.
        api: its jobs API.
        resume: start again where the last job of this run ended, or where an earlier cluster left the run.

    Raises:
        ResumeError: a job of this name has ended and ``resume`` was not asked for, or runs another configuration.
        ConfigError: the job's files are too large, or something in them looks like a secret.
        ClusterError: the cluster does not answer.
    """
    config = with_absolute_paths(recipe.config)
    recipe = Recipe(config, identity_hash(config), recipe.path)
    name, run_dir = str(recipe.config.name), run_dir_of(recipe)
    require_no_secret(recipe)
    newest = max(api.jobs_of(name), key=lambda job: job.number, default=None)
    if newest is not None and not newest.has_ended:
        return _attach(newest, recipe, run_dir=run_dir)
    if newest is not None and not resume:
        raise ResumeError(
            "the last job of this run has ended",
            where=newest.job_id,
            found=newest.status,
            fix=f"go on with the run: add --resume\nor start another: name={name}-2",
        )
    number = 1 if newest is None else newest.number + 1
    job_id = job_id_of(name, number=number)
    file_name = os.path.splitext(os.path.basename(recipe.path))[0] + ".yaml"
    grace_s = stop_grace_s(recipe.config)
    environment = cluster.runtime_env
    with packed(
        {file_name: dump_yaml(recipe.config)}, include=environment.include, ship_code=environment.ship_code
    ) as package:
        started = api.submit(
            job_id=job_id,
            entrypoint=entrypoint(cluster, "train", file_name, *(["--resume-or-start"] if resume else [])),
            runtime_env=runtime_env(cluster, working_dir=package.folder, grace_s=grace_s),
            metadata={
                STOP_GRACE_KEY: f"{grace_s:g}",
                RUN_KEY: name,
                RUN_DIR_KEY: run_dir,
                CONFIG_HASH_KEY: recipe.config_hash,
                NUMBER_KEY: str(number),
                "raydist_version": __version__,
            },
        )
    if not started:
        return _attach(api.find(job_id), recipe, run_dir=run_dir)
    return Submission(job_id, False, run_dir, num_files=len(package.sizes), size_bytes=package.size_bytes)


def stop_grace_s(config: RunConfig) -> float:
    """How long a job may take from the request to stop until Ray ends it by force."""
    return config.scaling.stop_grace_s + _CLOSING_S


def job_id_of(name: str, *, number: int = 1) -> str:
    """The submission id of a run's job; the second and later ones of a run are numbered.

    A name that is changed for it, or that looks numbered, gets a hash of the original, so that two runs never share an id.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    if safe != name or re.search(r"\.job\d+$", name):
        safe = f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:_HASH_CHARS]}"
    return f"{_PREFIX}{safe}" if number == 1 else f"{_PREFIX}{safe}.job{number}"


def entrypoint(cluster: ClusterConfig, *words: str) -> str:
    """A verb on the head. ``exec``, so that the signal of a stop reaches raydist and no shell before it."""
    return shlex.join(["exec", cluster.python, "-m", "raydist.cli.main", *words, "--address", "auto"])


def runtime_env(cluster: ClusterConfig, *, working_dir: str, grace_s: float = _CLOSING_S) -> dict[str, object]:
    """What Ray prepares for the job; holds no value that the cluster file was not allowed to name."""
    environment = cluster.runtime_env
    prepared: dict[str, object] = {
        "working_dir": working_dir,
        "env_vars": {GRACE_VARIABLE: str(math.ceil(grace_s)), **cluster.env},
    }
    if environment.pip:
        prepared["pip"] = list(environment.pip)
    if environment.image_uri is not None:
        prepared["image_uri"] = environment.image_uri
    return prepared


def _attach(job: Job, recipe: Recipe, *, run_dir: str) -> Submission:
    if job.config_hash != recipe.config_hash:
        raise ResumeError(
            "a job of this name runs another configuration",
            where=job.job_id,
            found=f"configuration hash {recipe.config_hash[:12]}",
            expected=f"{(job.config_hash or '')[:12]}, as the job was submitted",
            fix="give this one another name: name=...",
        )
    return Submission(job.job_id, True, job.run_dir or run_dir)


def require_no_secret(recipe: Recipe) -> None:
    """The recipe is stored with the job, where everybody who may see the job reads it.

    Raises:
        ConfigError: a value of it looks like a secret.
    """
    for key, value in flatten(recipe.config.model_dump(mode="json")).items():
        if isinstance(value, str) and looks_secret("", value):
            raise ConfigError(
                "a value looks like a secret, and recipes are stored with the job",
                where=key,
                expected="no password or key; the nodes have them in their environment",
                fix="take it out of the recipe, and name the variable under env_names in the cluster file",
            )
