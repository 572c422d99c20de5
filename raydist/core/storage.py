"""Files on a local disk or in a bucket, named by plain strings.

Paths are ``str`` because ``pathlib`` breaks ``s3://``. Local writes appear by rename and are complete or absent; objects in a
bucket appear whole by the protocol. A bucket that does not answer, or answers 500 or 503, is asked again for some minutes;
the environment's RAYDIST_STORAGE_RETRY_S changes how many seconds. This is the only module that imports fsspec.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

from raydist.core.errors import RaydistError, StorageError
from raydist.core.retry import GaveUp, retry

_T = TypeVar("_T")
_CHUNK_BYTES = 1 << 20
_READ_BYTES = 8 << 20
_PART_BYTES, _MAX_PARTS = 16 << 20, 9000
_CONCURRENT_PARTS = 4
_RETRY_S, _FIRST_CONTACT_RETRY_S = 300.0, 45.0
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 10, 60
_TRANSIENT_ERRNOS = {
    errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE,
    errno.ENETUNREACH, errno.EHOSTUNREACH,
}  # fmt: skip
_TRANSIENT_NAMES = {
    "EndpointConnectionError", "HTTPClientError", "ConnectionError", "ResponseParserError", "IncompleteReadError",
    "ClientPayloadError", "ClientConnectionError", "FSTimeoutError",
}  # fmt: skip
_reached: set[str] = set()


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
    """``root/part/...`` for both kinds of paths; a part that is a whole remote path, like an absolute one, stands alone."""
    for index, part in enumerate(parts):
        if is_remote(part):
            return join(part, *parts[index + 1 :])
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


def was_reached(*paths: str) -> None:
    """Says that another process of the run has used these paths' buckets, so that no outage of theirs is a wrong address."""
    _reached.update(_bucket(path) for path in paths if is_remote(path))


def _bucket(path: str) -> str:
    return path[: (path + "/").index("/", path.index("://") + 3)]


def _filesystem(path: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if path.startswith("s3://"):
        options = {
            # part of the key under which fsspec keeps filesystems, so that a process may use several endpoints
            "endpoint_url": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None,
            "config_kwargs": {
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "read_timeout": _READ_TIMEOUT_S,
                "retries": {"total_max_attempts": 1},  # s3fs repeats at once a few times, retry() for as long as it may
            },
            "use_listings_cache": False,
        }
    return fsspec.core.url_to_fs(path, **options)[0]


def _remote(path: str, call: Callable[[Any], _T], *, doing: str) -> _T:
    """What ``call`` returns for the filesystem of ``path``; repeated while the server is away.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the server did not recover in time, or refused.
    """
    what, root = f"{doing} {path}", _bucket(path)
    allowed_s = float(os.environ.get("RAYDIST_STORAGE_RETRY_S", _RETRY_S))
    total_s = allowed_s if root in _reached else min(_FIRST_CONTACT_RETRY_S, allowed_s)
    try:
        result = retry(lambda: call(_filesystem(path)), what=what, total_s=total_s, is_transient=_is_transient)
    except GaveUp as gave_up:
        raise StorageError(
            "the bucket cannot be reached",
            where=path,
            found=f"{gave_up.__cause__}, after {gave_up}",
            fix="check the server and AWS_ENDPOINT_URL, then go on with --resume",
        ) from gave_up
    except FileNotFoundError:
        _reached.add(root)
        raise
    except Exception as error:
        if not _is_refusal(error):
            raise
        raise StorageError(
            "the bucket refuses this access",
            where=path,
            found=f"{error or type(error).__name__} ({doing})",
            expected="credentials that may read and write it",
            fix="check AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ) from error
    _reached.add(root)
    return result


def _is_transient(error: Exception) -> bool:
    """Whether a server may answer the same request another time."""
    response = getattr(error.__cause__, "response", None) or {}
    if response.get("Error", {}).get("Code") == "NoSuchUpload":  # as after a completion whose answer was lost
        return True
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__)


def _is_refusal(error: Exception) -> bool:
    names = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}
    return isinstance(error, PermissionError) or type(error).__name__ in names


def exists(path: str) -> bool:
    """Whether a file or folder (or, in a bucket, any object under the prefix) is there; StorageError where nobody can tell."""
    if is_remote(path):
        return bool(_remote(path, lambda filesystem: filesystem.exists(path), doing="looking for"))
    try:
        os.stat(local_path(path))
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (None, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return False
        raise StorageError("a path cannot be looked at", where=path, found=error) from error
    return True


def size_bytes(path: str) -> int:
    """The size of one file."""
    if is_remote(path):
        return int(_remote(path, lambda filesystem: filesystem.size(path), doing="looking at"))
    return os.path.getsize(local_path(path))


def list_names(path: str) -> list[str]:
    """Names (not paths) directly under a folder, sorted; empty if there is none."""
    if is_remote(path):
        try:
            entries = _remote(path, lambda filesystem: filesystem.ls(path, detail=False, refresh=True), doing="listing")
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
        root = _filesystem(path)._strip_protocol(path).rstrip("/") + "/"
        found = _remote(path, lambda filesystem: filesystem.find(path), doing="listing")
        return sorted(entry.removeprefix(root) for entry in found)
    root = local_path(path)
    files: list[str] = []
    for folder, _, names in os.walk(root):
        files.extend(os.path.relpath(os.path.join(folder, name), root) for name in names)
    return sorted(files)


class _RemoteStream(io.RawIOBase):
    """An object as a file: each read is one ranged request, repeated like any other."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._size_bytes = size_bytes(path)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + view.nbytes, self._size_bytes)
        if stop <= self._at:
            return 0
        data = read_range(self._path, start=self._at, stop=stop)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def open_read(path: str) -> Iterator[IO[bytes]]:
    """A binary stream of one file."""
    if is_remote(path):
        with io.BufferedReader(_RemoteStream(path), buffer_size=_READ_BYTES) as stream:
            yield cast("IO[bytes]", stream)
    else:
        with open(local_path(path), "rb") as stream:
            yield stream


def read_range(path: str, *, start: int, stop: int) -> bytes:
    """Bytes ``[start, stop)`` of a file that is at least so long; large ranges of a bucket in concurrent requests."""
    if not is_remote(path):
        with open(local_path(path), "rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)
    cuts = [*range(start, stop, _PART_BYTES), stop]

    def fetch(filesystem: Any) -> list[bytes]:
        if len(cuts) == 2:
            return [filesystem.cat_file(path, start=start, end=stop)]
        return cast(
            "list[bytes]", filesystem.cat_ranges([path] * (len(cuts) - 1), cuts[:-1], cuts[1:], on_error="raise")
        )

    return b"".join(_remote(path, fetch, doing="reading"))


def read_bytes(path: str) -> bytes:
    """A whole file."""
    if is_remote(path):
        return bytes(_remote(path, lambda filesystem: filesystem.cat_file(path), doing="reading"))
    with open_read(path) as stream:
        return stream.read()


def read_json(path: str) -> Any:
    """A whole JSON file."""
    return json.loads(read_bytes(path))


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file that is either whole or absent, whatever happens in between."""
    if is_remote(path):
        _write_remote(path, lambda filesystem: filesystem.pipe_file(path, data))
        return
    with atomic_file(path) as partial, open(partial, "wb") as stream:
        stream.write(data)


def _write_remote(path: str, call: Callable[[Any], Any]) -> None:
    try:
        _remote(path, call, doing="writing")
    except FileNotFoundError as error:
        raise StorageError(
            "there is no such bucket", where=path, found=error, fix="create it, or mend the path"
        ) from None


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
        part_bytes = max(_PART_BYTES, -(-os.path.getsize(source) // _MAX_PARTS))
        options = {"chunksize": part_bytes, "max_concurrency": _CONCURRENT_PARTS} if target.startswith("s3://") else {}
        _write_remote(target, lambda filesystem: filesystem.put_file(source, target, **options))
        return
    with atomic_file(target) as partial:
        shutil.copyfile(source, partial)


def download_file(source: str, target: str) -> None:
    """Copies a file of either kind to a local path, atomically."""
    with atomic_file(target) as partial, open_read(source) as reader, open(partial, "wb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK_BYTES)


@contextmanager
def fetched(folder: str) -> Iterator[str]:
    """A local folder with the files of ``folder``: itself, or a copy of one in a bucket that goes when the block ends."""
    if not is_remote(folder):
        yield local_path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="raydist-fetched-") as copy:
        for name in list_files(folder):
            download_file(join(folder, name), os.path.join(copy, *safe_name(name, where=folder).split("/")))
        yield copy


@contextmanager
def filled(folder: str) -> Iterator[str]:
    """A local folder to write files into: ``folder`` itself, or one whose files are uploaded when the block ends well."""
    if not is_remote(folder):
        make_folder(folder)
        yield local_path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="raydist-filled-") as scratch:
        yield scratch
        for name in list_files(scratch):
            upload_file(os.path.join(scratch, name), join(folder, *name.split(os.sep)))


def make_folder(path: str) -> None:
    """Makes a local folder; buckets have none."""
    if not is_remote(path):
        os.makedirs(local_path(path), exist_ok=True)


def remove_tree(path: str) -> None:
    """Deletes a folder and all in it; silent if it is not there."""
    if is_remote(path):
        _remote(path, lambda filesystem: _remove_objects(filesystem, path), doing="deleting")
        return
    target = local_path(path)
    if not os.path.exists(target):
        return
    hidden = f"{target}.deleted-{uuid.uuid4().hex[:8]}"
    os.replace(target, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_objects(filesystem: Any, path: str) -> None:
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)
        for left in filesystem.find(
            path
        ):  # s3fs drops what went wrong in a bulk deletion; of a single one it is raised
            filesystem.rm_file(left)


def sha256(path: str) -> str:
    """The SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open_read(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
