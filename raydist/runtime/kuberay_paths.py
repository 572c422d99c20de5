"""From the paths of a recipe, which are of the machine that renders it, to those of a cluster's pods."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydist.config.base import validated
from raydist.config.schema import RunConfig
from raydist.core import storage
from raydist.core.errors import ConfigError

STORAGE_ROOT = "raydist/storage-root"
WEIGHTS_ROOT = "raydist/weights-root"


@dataclass(frozen=True)
class Roots:
    """Where a cluster keeps things.

    Attributes:
        storage: bucket prefix or shared folder of runs and datasets.
        weights: folder of model weights and tables on every pod.
        mounts: folders that are volumes of every pod; absolute paths below them mean the same in all pods.
        where: the cluster file, for messages.
    """

    storage: str
    weights: str
    mounts: Sequence[str]
    where: str

    @classmethod
    def of(cls, annotations: Mapping[str, Any], *, mounts: Sequence[str], where: str) -> Roots:
        """The roots that a cluster file's annotations name.

        Raises:
            ConfigError: an annotation is missing.
        """
        found = {}
        for key, example in ((STORAGE_ROOT, "s3://bucket/prefix"), (WEIGHTS_ROOT, "/mnt/raydist")):
            value = annotations.get(key)
            if not isinstance(value, str) or not value:
                raise ConfigError(
                    "the cluster file does not say where things lie",
                    where=f"{where}: metadata.annotations",
                    expected=f"{key}: {example}",
                )
            found[key] = value.rstrip("/")
        return cls(found[STORAGE_ROOT], found[WEIGHTS_ROOT], mounts=tuple(mounts), where=where)


def in_cluster(config: RunConfig, roots: Roots) -> RunConfig:
    """The configuration with every path as the pods reach it.

    Relative ``output_dir`` and dataset paths go below the storage root, relative weights and tables below the weights root;
    an address stays, and so does an absolute path below a volume of the pods.

    Raises:
        ConfigError: an absolute path that only this machine has.
    """
    values = config.model_dump(mode="json")
    values["output_dir"] = _below(roots.storage, values["output_dir"], key="output_dir", roots=roots)
    for split in ("train", "validation"):
        for index, part in enumerate(values["data"][split]):
            part["path"] = _below(roots.storage, part["path"], key=f"data.{split}.{index}.path", roots=roots)
    if values["model"]["init_from"] is not None:
        values["model"]["init_from"] = _below(
            roots.weights, values["model"]["init_from"], key="model.init_from", roots=roots
        )
    for section in ("objective", "training"):
        values[section] = _with_tables(values[section], key=section, roots=roots)
    return validated(RunConfig, values)


def on_spool(config: RunConfig, mount: str) -> RunConfig:
    """The configuration with checkpoint spool and data cache on the pods' local volume, unless it names other folders."""
    values = config.model_dump(mode="json")
    if values["checkpoint"]["spool_dir"] is None:
        values["checkpoint"]["spool_dir"] = storage.join(mount, "checkpoints")
    if values["data"]["cache_dir"] is None:
        values["data"]["cache_dir"] = storage.join(mount, "shards")
    return validated(RunConfig, values)


def needs_weights(config: RunConfig, roots: Roots) -> bool:
    """Whether a resolved configuration reads anything below the weights root."""
    return _mentions(config.model_dump(mode="json"), roots.weights + "/")


def _mentions(value: Any, prefix: str) -> bool:
    if isinstance(value, dict):
        return any(_mentions(item, prefix) for item in value.values())
    if isinstance(value, list):
        return any(_mentions(item, prefix) for item in value)
    return isinstance(value, str) and value.startswith(prefix)


def _with_tables(value: Any, *, key: str, roots: Roots) -> Any:
    """An objective's own files: string values of keys called ``path``."""
    if isinstance(value, list):
        return [_with_tables(item, key=f"{key}.{index}", roots=roots) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return {
        name: _below(roots.weights, item, key=f"{key}.{name}", roots=roots)
        if name == "path" and isinstance(item, str)
        else _with_tables(item, key=f"{key}.{name}", roots=roots)
        for name, item in value.items()
    }


def _below(root: str, path: str, *, key: str, roots: Roots) -> str:
    if storage.is_remote(path):
        return path
    plain = path.removeprefix("file://")
    if plain.startswith("/"):
        if any(plain == mount or plain.startswith(mount.rstrip("/") + "/") for mount in roots.mounts):
            return plain
    elif not plain.startswith("~"):
        relative = posixpath.normpath(plain)
        if not relative.startswith(".."):
            return storage.join(root, relative)
    raise ConfigError(
        "the pods of the cluster do not have this path",
        where=key,
        found=path,
        expected=f"s3://..., a relative path (placed below {root}), or one below {', '.join(roots.mounts)}",
        fix=f"{key}=s3://bucket/prefix, or mount a volume of that name on head and workers in {roots.where}",
    )
