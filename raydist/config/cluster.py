"""Cluster files: where jobs are sent, and what the cluster's nodes are expected to have.

A cluster file never holds a secret: ``env_names`` names variables that the nodes have themselves (from a Kubernetes secret,
an instance profile, a service's environment), and ``env`` is for settings that may be read by anyone who can see the job.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, field_validator, model_validator

from raydist.config.base import StrictModel, validated
from raydist.config.load import flatten
from raydist.config.yaml_limits import read_documents
from raydist.core.errors import ConfigError
from raydist.core.units import parse_bytes

_KUBERAY_API = "ray.io/"
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZER|S(?:_|$))|SECRET|PASSW|CREDENTIAL|AUTH(?!_MODE)", re.IGNORECASE)
# What keys look like wherever they stand: AWS, Hugging Face, GitHub, a PEM block, a password inside an address.
_SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|-----BEGIN |://[^/\s:@]+:[^/\s@]+@"
)


class RuntimeEnvConfig(StrictModel):
    """What Ray prepares for the job on each node. Best nothing: an image that has everything starts fastest."""

    image_uri: str | None = None
    """A container image for the job's processes; None: what the nodes run."""
    pip: list[str] = Field(default_factory=list)
    """Packages that each node installs before the job's first process; pinned."""
    ship_code: bool = False
    """Send this machine's raydist instead of using the one installed on the nodes."""
    include: list[str] = Field(default_factory=list)
    """Files that travel with the recipe: globs below the folder of the command, e.g. prompts/*.txt."""

    @field_validator("pip")
    @classmethod
    def _pinned(cls, value: list[str]) -> list[str]:
        loose = [package for package in value if not re.search(r"==|@ ", package)]
        if loose:
            raise ValueError(f"packages pinned with ==, not {', '.join(loose)}")
        return value

    @field_validator("include")
    @classmethod
    def _below(cls, value: list[str]) -> list[str]:
        outside = [glob for glob in value if glob.startswith(("/", "~")) or ".." in glob.split("/")]
        if outside:
            raise ValueError(f"globs below the folder of the command, not {', '.join(outside)}")
        return value


class PreflightConfig(StrictModel):
    """What a node must have before it is used."""

    min_disk: str = "5GiB"
    """Free bytes on the disk of the node's cache and spool."""
    min_shared_memory: str = "64MiB"
    """Free bytes in /dev/shm."""
    max_clock_skew_s: PositiveFloat = 2.0
    """Largest difference between a node's clock and the head's."""
    timeout_s: PositiveFloat = 60.0
    """What a single check may take on a node."""

    @field_validator("min_disk", "min_shared_memory")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        try:
            parse_bytes(value)
        except ConfigError as error:
            raise ValueError(f"{error.what}: {value!r}, e.g. 5GiB") from None
        return value


class ClusterConfig(StrictModel):
    """One Ray cluster as a user of its jobs API sees it."""

    address: str
    """The jobs API, which is the Ray dashboard's address: http://127.0.0.1:8265, also through a port-forward."""
    python: str = "python"
    """The interpreter that has raydist, on the head."""
    output_dir: str | None = None
    """Instead of the recipe's: a bucket prefix or a path that every node reaches."""
    mlflow_uri: str | None = None
    """Instead of the recipe's tracking.mlflow_uri: a server that the nodes reach."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe for this cluster, dotted: {scaling.num_workers: 16}. key=value on the command line wins."""
    env_names: list[str] = Field(default_factory=list)
    """Variables that every node must have set. Only the names travel; `raydist preflight` looks for them."""
    env: dict[str, str] = Field(default_factory=dict)
    """Settings of the job's processes. They are shown to everyone who may see the job, so secrets are refused."""
    runtime_env: RuntimeEnvConfig = RuntimeEnvConfig()
    preflight: PreflightConfig = PreflightConfig()

    @field_validator("address")
    @classmethod
    def _is_http(cls, value: str) -> str:
        return require_jobs_address(value)

    @field_validator("env_names")
    @classmethod
    def _are_names(cls, value: list[str]) -> list[str]:
        wrong = [name for name in value if not _ENV_NAME.fullmatch(name)]
        if wrong:
            raise ValueError("names of environment variables, without values")
        return value

    @field_validator("env")
    @classmethod
    def _is_public(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _ENV_NAME.fullmatch(name):
                raise ValueError(f"no name of a variable: {name!r}")
            if looks_secret(name, text):
                raise ValueError(
                    f"{name} looks like a secret, and these values are shown with the job; let the nodes have the variable "
                    "and put its name under env_names"
                )
        return value

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        for key, value in flatten(self.model_dump(mode="json")).items():
            if isinstance(value, str) and looks_secret("", value):
                raise ValueError(
                    f"{key} looks like a secret, and cluster files are sent with the job; let the nodes have it in their "
                    "environment"
                )
        return self


def looks_secret(name: str, value: str) -> bool:
    """Whether a setting should not be written where others read it."""
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))


def require_jobs_address(value: str) -> str:
    """An ``http(s)://host[:port]`` without credentials.

    Raises:
        ValueError: it is something else.
    """
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError("http://host:port of the Ray dashboard") from None
    if parts.username or parts.password:
        raise ValueError("an address without user and password; Ray's token comes from RAY_AUTH_TOKEN or its file")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("http://host:port of the Ray dashboard, e.g. http://127.0.0.1:8265")
    netloc = f"{parts.hostname}:{port}" if port else parts.hostname
    return f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}"


def is_manifest(path: str) -> bool:
    """Whether a file makes clusters, for KubeRay or for ``ray up``, rather than saying where one is.

    Raises:
        ConfigError: the file cannot be read.
    """
    return any(
        str(document.get("apiVersion", "")).startswith(_KUBERAY_API) or {"cluster_name", "provider"} <= document.keys()
        for document in _documents(path)
    )


def load_cluster(path: str, *, address: str | None = None) -> ClusterConfig:
    """Reads a cluster file; of a manifest nothing is used but that it is one, and the address is then required.

    Args:
        path: YAML.
        address: of the jobs API, instead of the file's.

    Raises:
        ConfigError: missing, no YAML, an unknown key, a value that does not fit, or no address.
    """
    documents = _documents(path)
    if is_manifest(path):
        if address is None:
            raise ConfigError(
                "a manifest does not say where its Ray dashboard can be reached",
                where=path,
                expected="--address http://host:port, e.g. of: kubectl port-forward svc/<cluster>-head-svc 8265",
                fix="print the manifest for kubectl or ray up instead: --render",
            )
        return cluster_at(address)
    if len(documents) != 1:
        raise ConfigError("a cluster file is one YAML mapping", where=path, found=f"{len(documents)} documents")
    values = documents[0]
    if address is not None:
        values = {**values, "address": address}
    try:
        return validated(ClusterConfig, values)
    except ConfigError as error:
        raise error.moved_to(": ".join(filter(None, (path, error.where)))) from None


def cluster_at(address: str) -> ClusterConfig:
    """A cluster of which nothing but the address is known.

    Raises:
        ConfigError: it is no address of a jobs API.
    """
    try:
        return ClusterConfig(address=require_jobs_address(address))
    except ValueError as error:
        raise ConfigError(
            "not the address of a jobs API", where="--address", found=address, expected=str(error)
        ) from None


def recipe_overrides(cluster: ClusterConfig, overrides: Sequence[str]) -> list[str]:
    """``key=value`` words for a recipe on this cluster; the user's come last and win."""
    words = [f"output_dir={json.dumps(cluster.output_dir)}"] if cluster.output_dir is not None else []
    if cluster.mlflow_uri is not None:
        words.append(f"tracking.mlflow_uri={json.dumps(cluster.mlflow_uri)}")
    words += [f"{key}={json.dumps(value)}" for key, value in cluster.overrides.items()]
    return [*words, *overrides]


def _documents(path: str) -> list[dict[str, Any]]:
    documents = [document for document in read_documents(path) if document is not None]
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise ConfigError(
            "a cluster file is a YAML mapping", where=path, expected="address: http://127.0.0.1:8265, ..."
        )
    return [{str(key): value for key, value in document.items()} for document in documents]
