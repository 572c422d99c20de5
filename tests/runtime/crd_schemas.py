"""KubeRay's own schemas, made to refuse what an API server would silently drop."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

_BESIDE = Path(__file__).parents[3] / "shared" / "kuberay_crds"
_FILES = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}


def crd_folder() -> Path:
    """The folder of KubeRay's CustomResourceDefinitions; skips the test where there is none."""
    folder = Path(os.environ.get("KUBERAY_CRDS", _BESIDE))
    if not folder.is_dir():
        pytest.skip("KubeRay's CRDs are not here: set KUBERAY_CRDS to a folder with ray.io_rayjobs.yaml")
    return folder


@functools.cache
def schema_of(kind: str) -> dict[str, Any]:
    """The v1 schema of a kind, in which every object without free fields is closed."""
    text = (crd_folder() / _FILES[kind]).read_text()
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    """A structural schema drops unknown fields of objects with properties; this one forbids them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    keeps = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and "type" in schema and not keeps:
        result.setdefault("additionalProperties", False)
    return result


def require_valid(document: dict[str, Any], *, kind: str) -> None:
    """Raises jsonschema's error, deepest first, where the document does not fit its kind."""
    _raise_best(schema_of(kind), document)


def require_valid_pod(template: dict[str, Any]) -> None:
    """The same for a pod template of any workload, by the schema that KubeRay has for its head."""
    spec = schema_of("RayCluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    spec = {**spec, "properties": {**spec["properties"], "metadata": {"type": "object"}}}
    _raise_best(spec, template)


def _raise_best(schema: dict[str, Any], document: dict[str, Any]) -> None:
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(document))
    if error is not None:
        raise error
