"""Files on a local disk or in a bucket, named by plain strings.

Paths are ``str`` because ``pathlib`` breaks ``s3://``. Local writes appear by rename and are complete or absent; objects in a
bucket appear whole by the protocol. This is the only module that imports fsspec.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from raydist.core.errors import RaydistError

_CHUNK_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """True for ``s3://...`` and other protocols, False for a path of this machine."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """A local path without ``file://``, made absolute and with ``~`` expanded."""
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def normalize(path: str) -> str:
    """The one spelling of a path that configuration, manifests and trackers carry."""
    return path.rstrip("/") if is_remote(path) else local_path(path)


def join(root: str, *parts: str) -> str:
    """``root/part/...`` for both kinds of paths."""
    return posixpath.join(root, *parts) if is_remote(root) else os.path.join(root, *parts)


def safe_name(name: str, *, where: str) -> str:
    """Returns a file name that came from outside, if it stays inside its folder.

    Relative names with ``/`` are allowed; absolute names, ``..``, backslashes, drive letters and control characters are not.

    Raises:
        RaydistError: the name would leave the folder.
    """
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 or c in "\\:" for c in name):
        raise RaydistError(
            "a file name leaves its folder", where=where, found=repr(name), expected="a relative name without '..'"
        )
    return name


def _filesystem(path: str) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(path)[0]


def exists(path: str) -> bool:
    """Whether a file or folder (or, in a bucket, any object under the prefix) is there."""
    if is_remote(path):
        filesystem = _filesystem(path)
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))
    return os.path.exists(local_path(path))


def size_bytes(path: str) -> int:
    """The size of one file."""
    if is_remote(path):
        return int(_filesystem(path).size(path))
    return os.path.getsize(local_path(path))


def list_names(path: str) -> list[str]:
    """Names (not paths) directly under a folder, sorted; empty if there is none."""
    if is_remote(path):
        filesystem = _filesystem(path)
        filesystem.invalidate_cache()
        try:
            entries = filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = {posixpath.basename(entry.rstrip("/")) for entry in entries}
        return sorted(names - {"", posixpath.basename(path.rstrip("/"))})
    try:
        return sorted(os.listdir(local_path(path)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_files(path: str) -> list[str]:
    """Relative names of all files below a folder, sorted."""
    if is_remote(path):
        filesystem = _filesystem(path)
        filesystem.invalidate_cache()
        root = filesystem._strip_protocol(path).rstrip("/") + "/"
        return sorted(entry.removeprefix(root) for entry in filesystem.find(path))
    root = local_path(path)
    found: list[str] = []
    for folder, _, names in os.walk(root):
        found.extend(os.path.relpath(os.path.join(folder, name), root) for name in names)
    return sorted(found)


@contextmanager
def open_read(path: str) -> Iterator[IO[bytes]]:
    """A binary stream of one file."""
    if is_remote(path):
        with _filesystem(path).open(path, "rb") as stream:
            yield stream
    else:
        with open(local_path(path), "rb") as stream:
            yield stream


def read_bytes(path: str) -> bytes:
    """A whole file."""
    with open_read(path) as stream:
        return stream.read()


def read_json(path: str) -> Any:
    """A whole JSON file."""
    return json.loads(read_bytes(path))


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file that is either whole or absent, whatever happens in between."""
    if is_remote(path):
        _filesystem(path).pipe_file(path, data)
        return
    with atomic_file(path) as partial, open(partial, "wb") as stream:
        stream.write(data)


def write_json(path: str, value: Any) -> None:
    """Writes JSON with sorted keys, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


@contextmanager
def atomic_file(path: str) -> Iterator[str]:
    """Yields the name of a local file to fill; it takes its place by rename when the block ends well."""
    target = local_path(path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.partial-{uuid.uuid4().hex[:8]}"
    try:
        yield partial
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, target)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def upload_file(source: str, target: str) -> None:
    """Copies a local file to a path of either kind."""
    if is_remote(target):
        _filesystem(target).put_file(source, target)
        return
    with atomic_file(target) as partial:
        shutil.copyfile(source, partial)


def download_file(source: str, target: str) -> None:
    """Copies a file of either kind to a local path, atomically."""
    with atomic_file(target) as partial, open_read(source) as reader, open(partial, "wb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK_BYTES)


def make_folder(path: str) -> None:
    """Makes a local folder; buckets have none."""
    if not is_remote(path):
        os.makedirs(local_path(path), exist_ok=True)


def remove_tree(path: str) -> None:
    """Deletes a folder and all in it; silent if it is not there."""
    if is_remote(path):
        filesystem = _filesystem(path)
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)
        return
    target = local_path(path)
    if not os.path.exists(target):
        return
    hidden = f"{target}.deleted-{uuid.uuid4().hex[:8]}"
    os.replace(target, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sha256(path: str) -> str:
    """The SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open_read(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
