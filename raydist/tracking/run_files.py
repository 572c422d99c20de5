"""The files that tracking keeps in a run directory, and their local copy when that directory is in a bucket.

A bucket has no append, so a run there is tracked in a node-local folder that is published as it grows.
"""

from __future__ import annotations

import hashlib
import os
import threading

from raydist.core import storage
from raydist.tracking import jsonl

RUN_RECORD = "mlflow.json"
SENT_RECORD = "mlflow.sent.json"
ARTIFACT_SPOOL = "mlflow.artifacts.jsonl"
_APPENDED = (jsonl.FILE_NAME, ARTIFACT_SPOOL)
_REPLACED = (RUN_RECORD, SENT_RECORD)
_SEEN = ".seen"


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
        self._publishing = threading.Lock()
        if storage.is_remote(self.run_dir):
            digest = hashlib.sha256(self.run_dir.encode()).hexdigest()[:16]
            self.folder = os.path.join(_cache_dir(), "tracking", digest)
            self._fetch(_REPLACED + _APPENDED)
        else:
            self.folder = self.run_dir

    def path(self, name: str) -> str:
        """The local path of one of the files."""
        return os.path.join(self.folder, name)

    def refresh(self) -> None:
        """Takes over what another node published since; nothing where the run directory is local."""
        if self.folder != self.run_dir:
            self._fetch((*_APPENDED, SENT_RECORD))

    def _fetch(self, names: tuple[str, ...]) -> None:
        present = set(storage.list_names(self.run_dir))
        for name in names:
            if name in present:
                self._take(name, storage.read_bytes(storage.join(self.run_dir, name)))

    def _take(self, name: str, published: bytes) -> None:
        """Brings the local copy up to what the bucket has; what only this node has stays and is published next."""
        own = storage.read_bytes(self.path(name)) if os.path.exists(self.path(name)) else None
        if name in _APPENDED:
            kept = _merged(name, own or b"", published)
        else:
            kept = own if own is not None and self._is_last_seen(name, published) else published
        if kept != own:
            storage.write_bytes(self.path(name), kept)
        if name in _REPLACED:
            self._see(name, published)
        if kept == published and (version := _version(self.path(name)))[0] == len(published):
            self._published[name] = version

    def _is_last_seen(self, name: str, published: bytes) -> bool:
        """Whether nobody else replaced the bucket's copy since this node fetched or published it."""
        path = self.path(name) + _SEEN
        return os.path.exists(path) and storage.read_bytes(path) == _digest(published)

    def _see(self, name: str, published: bytes) -> None:
        storage.write_bytes(self.path(name) + _SEEN, _digest(published))

    def publish(self) -> None:
        """Uploads the files that changed since the last call; nothing where the run directory is local."""
        if self.folder == self.run_dir:
            return
        with self._publishing:
            for name in _APPENDED + _REPLACED:
                if not os.path.exists(self.path(name)):
                    continue
                version = _version(self.path(name))
                if self._published.get(name) == version:
                    continue
                target = storage.join(self.run_dir, name)
                if name in _APPENDED:
                    storage.upload_file(self.path(name), target)
                else:
                    content = storage.read_bytes(self.path(name))
                    storage.write_bytes(target, content)
                    self._see(name, content)
                self._published[name] = version


def _version(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _merged(name: str, own: bytes, published: bytes) -> bytes:
    """What an appended file shall hold.

    One that only has more than was published stays; one that went on elsewhere in the meantime gives way, but for lines of
    the spool that only it has.
    """
    if own.startswith(published):
        return own
    if published.startswith(own) or name != ARTIFACT_SPOOL:
        return published
    known = set(published.splitlines(keepends=True))
    return published + b"".join(line for line in own.splitlines(keepends=True) if line not in known)


def _cache_dir() -> str:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "raydist")
