"""The files that tracking keeps in a run directory, and their local copy when that directory is in a bucket.

A bucket has no append, so a run there is tracked in a node-local folder that is published as it grows.
"""

from __future__ import annotations

import hashlib
import os

from raydist.core import storage
from raydist.tracking import jsonl

RUN_RECORD = "mlflow.json"
SENT_RECORD = "mlflow.sent.json"
ARTIFACT_SPOOL = "mlflow.artifacts.jsonl"
_APPENDED = (jsonl.FILE_NAME, ARTIFACT_SPOOL)
_REPLACED = (RUN_RECORD, SENT_RECORD)


class RunFiles:
    """The tracking files of one run.

    Args:
        run_dir: local or remote.

    Attributes:
        folder: where this process reads and writes them.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = storage.normalize(run_dir)
        self._published: dict[str, tuple[int, int]] = {}
        if storage.is_remote(self.run_dir):
            digest = hashlib.sha256(self.run_dir.encode()).hexdigest()[:16]
            self.folder = os.path.join(_cache_dir(), "tracking", digest)
            self._fetch()
        else:
            self.folder = self.run_dir

    def path(self, name: str) -> str:
        """The local path of one of the files."""
        return os.path.join(self.folder, name)

    def _fetch(self) -> None:
        """Takes over what the bucket has: records always, appended files where they are longer than the local ones."""
        present = set(storage.list_names(self.run_dir))
        for name in _REPLACED + _APPENDED:
            source, target = storage.join(self.run_dir, name), self.path(name)
            if name not in present:
                continue
            local_bytes = os.path.getsize(target) if os.path.exists(target) else -1
            if name in _REPLACED or storage.size_bytes(source) > local_bytes:
                storage.download_file(source, target)

    def publish(self) -> None:
        """Uploads the files that changed since the last call; nothing where the run directory is local."""
        if self.folder == self.run_dir:
            return
        for name in _APPENDED + _REPLACED:
            if not os.path.exists(self.path(name)):
                continue
            status = os.stat(self.path(name))
            version = (status.st_size, status.st_mtime_ns)
            if self._published.get(name) != version:
                storage.upload_file(self.path(name), storage.join(self.run_dir, name))
                self._published[name] = version


def _cache_dir() -> str:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "raydist")
