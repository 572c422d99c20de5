"""An exported model as a version in MLflow's model registry, which loads without unpickling anything.

A version is an MLflow model folder among the artifacts of the run that trained it: the code of
:mod:`raydist.serving.mlflow_model`, the exported files, and a model card. Files above the run's artifact limit are pointed
to instead of copied, and are fetched and verified when the version is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydist.core import storage
from raydist.core.errors import TrackingError
from raydist.models.hf import META_NAME, read_meta
from raydist.serving.model_card import model_card
from raydist.serving.text_model import default_new_tokens
from raydist.tracking import artifacts, server
from raydist.tracking.artifacts import ArtifactFile
from raydist.tracking.pull import POINTERS

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

    from raydist.tracking.find import TrackedRun

_CONTENT_TAG = "raydist.content"
_MAX_DESCRIPTION_CHARS = 5000
_LIBRARIES = ("raydist", "mlflow", "torch", "safetensors", "tokenizers", "numpy", "pandas", "pydantic", "omegaconf")


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model.

    Attributes:
        name: of the registered model.
        version: its number.
        uri: what ``mlflow.pyfunc.load_model`` takes.
        is_new: False where the run had registered the same files under this name before.
    """

    name: str
    version: int
    uri: str
    is_new: bool


def register_export(run: TrackedRun, *, export: str, name: str, max_bytes: int = 2 << 30) -> ModelVersion:
    """Makes an exported folder a version of a registered model; a second call with the same files finds the first's.

    Args:
        run: that trained it and shall hold its files.
        export: the exported folder, local or remote; of files above ``max_bytes`` the version only has the address.
        name: of the registered model, which is made if there is none.
        max_bytes: largest file that is copied to MLflow.

    Raises:
        TrackingError: the name is none, or MLflow is away or refuses.
        ModelError: the folder holds no model.
    """
    check_name(name)
    with server.explained(run.uri), server.patient_http():
        client = server.connect(run.uri)
        with tempfile.TemporaryDirectory() as scratch:
            entries = _stage(export, os.path.join(scratch, "export"), max_bytes=max_bytes)
            content = _content_hash(entries)
            known = _known_version(client, name, run_id=run.run_id, content=content)
            if known is not None:
                return _version(name, known, is_new=False)
            card = model_card(run, read_meta(export), entries)
            folder = os.path.join(scratch, "model")
            _write_model(folder, os.path.join(scratch, "export"), meta=read_meta(export), card=card)
            place = f"{artifacts.REGISTERED}/{name}/{content[:16]}"
            artifacts.upload(client, run.run_id, folder, folder=place, max_bytes=max_bytes)
        _ensure_model(client, name)
        created = client.create_model_version(
            name,
            source=f"runs:/{run.run_id}/{place}",
            run_id=run.run_id,
            description=card[:_MAX_DESCRIPTION_CHARS],
            tags={_CONTENT_TAG: content, "raydist.run": run.name},
        )
    return _version(name, int(created.version), is_new=True)


def _version(name: str, version: int, *, is_new: bool) -> ModelVersion:
    return ModelVersion(name=name, version=version, uri=f"models:/{name}/{version}", is_new=is_new)


def check_name(name: str) -> None:
    """Refuses what MLflow or a path cannot take as a registered model's name.

    Raises:
        TrackingError: see above.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,199}", name, re.ASCII):
        raise TrackingError(
            "not a name for a registered model",
            where="--register",
            found=repr(name),
            expected="letters, digits, '-', '_' and '.', beginning with a letter or digit",
        )


def _stage(export: str, target: str, *, max_bytes: int) -> list[ArtifactFile]:
    """Copies the small files of an export and writes down the addresses of the large ones; returns all of them."""
    if not storage.exists(storage.join(export, META_NAME)):
        raise TrackingError(
            "only models that raydist exported can be registered",
            where=export,
            expected=f"a folder with {META_NAME}",
            fix="raydist export MODEL --to DIR",
        )
    os.makedirs(target)
    entries = []
    for name in storage.list_files(export):
        source = storage.join(export, name)
        num_bytes = storage.size_bytes(source)
        uri = storage.normalize(source) if num_bytes > max_bytes else None
        entries.append(ArtifactFile(name, num_bytes, storage.sha256(source), uri))
        if uri is None:
            storage.download_file(source, os.path.join(target, name))
    pointed = [dataclasses.asdict(entry) for entry in entries if entry.uri is not None]
    if pointed:
        storage.write_json(os.path.join(target, POINTERS), pointed)
    return entries


def _content_hash(entries: list[ArtifactFile]) -> str:
    rows = sorted((entry.name, entry.sha256) for entry in entries)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _known_version(client: MlflowClient, name: str, *, run_id: str, content: str) -> int | None:
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    numbers = [int(version.version) for version in found if version.tags.get(_CONTENT_TAG) == content]
    return max(numbers, default=None)


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _write_model(folder: str, export: str, *, meta: Mapping[str, Any], card: str) -> None:
    import mlflow.pyfunc

    from raydist import serving

    mlflow.pyfunc.save_model(
        folder,
        python_model=os.path.join(os.path.dirname(serving.__file__), "mlflow_model.py"),
        artifacts={"export": export},
        signature=_signature(meta),
        pip_requirements=requirements(),
    )
    storage.write_bytes(os.path.join(folder, "README.md"), card.encode())


def _signature(meta: Mapping[str, Any]) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    own_sampler = json.dumps((meta.get("sampling") or {}).get("sampler") or {"name": "autoregressive"})
    texts = Schema([ColSpec(DataType.string)])
    params = [
        ParamSpec("sampler", DataType.string, own_sampler),
        ParamSpec("max_new_tokens", DataType.long, default_new_tokens(meta)),
        ParamSpec("seed", DataType.long, 0),
    ]
    return ModelSignature(inputs=texts, outputs=texts, params=ParamSchema(params))


def requirements() -> list[str]:
    """What a process needs to load a version, in the versions that are installed here."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in _LIBRARIES]
