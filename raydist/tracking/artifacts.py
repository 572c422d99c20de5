"""Files of a run, with sizes and hashes that are checked when they come back.

Each run carries ``raydist_artifacts.json``, a list of ``{name, size, sha256, uri}``. Files up to a limit are uploaded
and have ``uri`` null; larger ones stay in storage and are pointed to. :mod:`raydist.tracking.pull` brings them back.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydist.config.base import nearest_hint
from raydist.core import storage
from raydist.core.errors import TrackingError
from raydist.tracking import server

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from raydist.tracking.find import TrackedRun

MANIFEST = "raydist_artifacts.json"
CHECKPOINTS = "checkpoints"
REGISTERED = "registered"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ArtifactFile:
    """One file of a run.

    Attributes:
        name: relative path inside the run.
        size: bytes.
        sha256: of the content, as hex.
        uri: where it lies if MLflow only points to it.
    """

    name: str
    size: int
    sha256: str
    uri: str | None = None


def log_folder(run: TrackedRun, folder: str, *, name: str, max_bytes: int) -> list[ArtifactFile]:
    """Uploads a folder as ``name/`` of a run.

    Raises:
        TrackingError: MLflow cannot be reached or refuses.
    """
    with server.explained(run.uri):
        return upload(server.connect(run.uri), run.run_id, folder, folder=name, max_bytes=max_bytes)


def upload(client: MlflowClient, run_id: str, path: str, *, folder: str, max_bytes: int) -> list[ArtifactFile]:
    """Uploads a file or folder below ``folder`` of the run and enters it in the run's manifest.

    Args:
        client: of the server that has the run.
        run_id: the run.
        path: a local or remote file or folder.
        folder: place inside the run; ``""`` for its root.
        max_bytes: larger files are pointed to where they are.
    """
    entries = []
    with server.patient_http():
        for source, name in _files_of(path, folder):
            size = storage.size_bytes(source)
            uri = storage.normalize(source) if size > max_bytes else None
            entries.append(ArtifactFile(name, size, storage.sha256(source), uri))
            if uri is None:
                _upload_file(client, run_id, source, name)
        merged = {entry.name: entry for entry in read_manifest(client, run_id)}
        merged.update((entry.name, entry) for entry in entries)
        _write_manifest(client, run_id, list(merged.values()))
    return entries


def point_to(client: MlflowClient, run_id: str, entries: Sequence[ArtifactFile], *, folder: str) -> None:
    """Enters files that stay where they are in the run's manifest, in place of all that it had below ``folder``."""
    others = [entry for entry in read_manifest(client, run_id) if not entry.name.startswith(f"{folder}/")]
    _write_manifest(client, run_id, [*others, *entries])


def _files_of(path: str, folder: str) -> list[tuple[str, str]]:
    """``(source, name in the run)`` of a file, or of each file below a folder."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    if storage.list_names(path):
        return [(storage.join(path, name), prefix + name) for name in storage.list_files(path)]
    if not storage.is_remote(path) and os.path.isdir(storage.local_path(path)):
        return []
    return [(path, prefix + os.path.basename(path))]


def _upload_file(client: MlflowClient, run_id: str, source: str, name: str) -> None:
    folder, base = os.path.split(name)
    with tempfile.TemporaryDirectory() as scratch:
        local = source
        if storage.is_remote(source):
            local = os.path.join(scratch, base)
            storage.download_file(source, local)
        client.log_artifact(run_id, storage.local_path(local), artifact_path=folder or None)


def _write_manifest(client: MlflowClient, run_id: str, entries: Sequence[ArtifactFile]) -> None:
    rows = [dataclasses.asdict(entry) for entry in sorted(entries, key=lambda entry: entry.name)]
    client.log_text(run_id, json.dumps(rows, indent=1) + "\n", MANIFEST)


def read_manifest(client: MlflowClient, run_id: str) -> list[ArtifactFile]:
    """The files of a run; empty where nothing was logged.

    Raises:
        TrackingError: the manifest is no list of files, or a name in it would leave its folder.
    """
    if not any(item.path == MANIFEST for item in client.list_artifacts(run_id)):
        return []
    with tempfile.TemporaryDirectory() as scratch:
        rows = storage.read_json(client.download_artifacts(run_id, MANIFEST, scratch))
    return parse_entries(rows, where=f"run {run_id}: {MANIFEST}")


def parse_entries(rows: Any, *, where: str) -> list[ArtifactFile]:
    """The files that a list from outside describes.

    Raises:
        TrackingError: it is no list of files, or a name or hash in it is none.
        RaydistError: a name would leave its folder.
    """
    try:
        entries = [ArtifactFile(str(r["name"]), int(r["size"]), str(r["sha256"]), r["uri"]) for r in rows]
        if any(not _SHA256.fullmatch(entry.sha256) or entry.size < 0 for entry in entries):
            raise ValueError("a size or a hash is none")
    except (TypeError, KeyError, ValueError) as error:
        raise TrackingError("the list of artifacts is damaged", where=where, found=repr(error)) from None
    for entry in entries:
        storage.safe_name(entry.name, where=where)
    return entries


def list_artifacts(run: TrackedRun) -> list[ArtifactFile]:
    """The files of a run, by name.

    Raises:
        TrackingError: MLflow cannot be reached, or the manifest is damaged.
    """
    with server.explained(run.uri):
        return read_manifest(server.connect(run.uri), run.run_id)


def select(entries: Sequence[ArtifactFile], names: Sequence[str] | None, *, where: str) -> list[ArtifactFile]:
    """The entries that any of the names, folders or globs means; None means all but checkpoints and registered copies.

    Raises:
        TrackingError: one of them means nothing, or there are no files at all.
    """
    if not entries:
        raise TrackingError("the run has no artifacts", where=where, fix="raydist runs show says how far the run came")
    if names is None:
        return [entry for entry in entries if entry.name.split("/")[0] not in (CHECKPOINTS, REGISTERED)]
    chosen: dict[str, ArtifactFile] = {}
    for wanted in names:
        found = [e for e in entries if _matches(e.name, wanted.rstrip("/"))]
        if not found:
            known = [entry.name for entry in entries]
            raise TrackingError(
                "no such artifact",
                where=where,
                found=wanted,
                expected="one of " + ", ".join(known[:20]) + (" ..." if len(known) > 20 else ""),
                fix=nearest_hint(wanted, known),
            )
        chosen.update((entry.name, entry) for entry in found)
    return sorted(chosen.values(), key=lambda entry: entry.name)


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(wanted + "/") or fnmatch.fnmatchcase(name, wanted)
