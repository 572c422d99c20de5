"""Brings the files of a run into a local folder: several at once, going on where an earlier pull broke off.

Neither side is trusted. A name may not leave the target folder, nor may a link in it lead out; a file takes its place by
rename, and only when size and hash are right. What is still coming lies in ``.raydist-pull`` under the hash of the file:
files that MLflow only points to come in ranges, and a finished range is not fetched again; files that MLflow holds come
whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from raydist.core import storage
from raydist.core.errors import CapacityError, TrackingError
from raydist.core.units import format_bytes
from raydist.tracking import server
from raydist.tracking.artifacts import ArtifactFile, list_artifacts, parse_entries, select

if TYPE_CHECKING:
    from raydist.tracking.find import TrackedRun

POINTERS = "raydist_pointers.json"
NUM_THREADS = 8
_PARTS = ".raydist-pull"
_RANGE_BYTES = 32 << 20
_READ_BYTES = 8 << 20
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system
_POINTER_SCHEMES = ("", "file", "s3", "gs", "abfs", "abfss", "az", "hdfs")

Held = Callable[[ArtifactFile, str], str]
"""Fetches a file that MLflow holds into a folder; returns its path."""
Progress = Callable[[int, int, int], None]
"""Gets the bytes fetched now, the bytes that are there and the bytes of all files, from any thread."""


def pull(
    run: TrackedRun,
    *,
    to: str,
    names: Sequence[str] | None = None,
    num_threads: int = NUM_THREADS,
    progress: Progress | None = None,
) -> list[str]:
    """Brings files of a run into a local folder and checks each one.

    Args:
        run: the run.
        to: local folder; made if it is not there.
        names: names, folders or globs inside the run; None for all.
        num_threads: most transfers at a time.
        progress: called as bytes arrive.

    Returns:
        Local paths of all chosen files.

    Raises:
        TrackingError: no such artifact, what came is not what was logged, or a link leads out of the folder.
        CapacityError: the disk is too small.
    """
    entries = select(list_artifacts(run), names, where=f"run {run.name}")
    with server.explained(run.uri), server.patient_http():
        client = server.connect(run.uri)

        def held(entry: ArtifactFile, scratch: str) -> str:
            return str(client.download_artifacts(run.run_id, entry.name, scratch))

        return fetch_all(entries, to=to, held=held, num_threads=num_threads, progress=progress)


def fetch_pointed(folder: str) -> None:
    """Completes a registered model's folder by the files that it only points to; nothing where it has all.

    Raises:
        TrackingError: a file is gone or changed.
    """
    path = os.path.join(folder, POINTERS)
    if os.path.exists(path):
        fetch_all(parse_entries(storage.read_json(path), where=path), to=folder, held=_refuse_held)


def _refuse_held(entry: ArtifactFile, scratch: str) -> str:
    raise TrackingError("a pointer without an address", where=entry.name, expected="a path or s3://")


def fetch_all(
    entries: Sequence[ArtifactFile],
    *,
    to: str,
    held: Held,
    num_threads: int = NUM_THREADS,
    progress: Progress | None = None,
) -> list[str]:
    """Brings files into a local folder, as :func:`pull` does; ``held`` fetches those that have no address."""
    root = storage.local_path(to)
    os.makedirs(root, exist_ok=True)
    targets = [_target(root, entry.name) for entry in entries]
    with ThreadPoolExecutor(num_threads) as threads:
        there = threads.map(_is_there, targets, entries)
        missing = [(entry, target) for entry, target, done in zip(entries, targets, there, strict=True) if not done]
        num_missing_bytes = sum(entry.size for entry, _ in missing)
        parts = os.path.dirname(_target(root, f"{_PARTS}/part"))
        _require_room(root, num_missing_bytes - _num_kept_bytes(parts, [entry for entry, _ in missing]))
        tally = _Tally(sum(entry.size for entry in entries), progress)
        tally.add(tally.total_bytes - num_missing_bytes, fetched_bytes=0)
        _Transfer(parts, held=held, tally=tally, threads=threads).bring(missing)
    return targets


class _Tally:
    """Counts bytes from several threads."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self.total_bytes = total_bytes
        self._num_fetched_bytes = 0
        self._num_there_bytes = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, num_bytes: int, *, fetched_bytes: int) -> None:
        """Counts bytes that are there now, of which some were fetched."""
        with self._lock:
            self._num_there_bytes += num_bytes
            self._num_fetched_bytes += fetched_bytes
            if self._progress is not None:
                self._progress(self._num_fetched_bytes, self._num_there_bytes, self.total_bytes)


class _Transfer:
    """Fetches files through a folder of parts, whose names are hashes."""

    def __init__(self, parts: str, *, held: Held, tally: _Tally, threads: ThreadPoolExecutor) -> None:
        self._parts = parts
        self._held = held
        self._tally = tally
        self._threads = threads

    def bring(self, missing: Sequence[tuple[ArtifactFile, str]]) -> None:
        """All files, or the first failure after the transfers under way have ended."""
        if not missing:
            return
        os.makedirs(self._parts, exist_ok=True)
        try:
            self._run([lambda e=e, t=t: self._bring_held(e, t) for e, t in missing if e.uri is None])  # type: ignore[misc]
            for entry, target in missing:
                if entry.uri is not None:
                    self._bring_pointed(entry, target)
        finally:
            with contextlib.suppress(OSError):
                os.rmdir(self._parts)  # stays where a range is worth keeping

    def _run(self, tasks: Sequence[Callable[[], None]]) -> None:
        futures = [self._threads.submit(task) for task in tasks]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)  # those under way still write to the file that the caller closes

    def _bring_held(self, entry: ArtifactFile, target: str) -> None:
        with tempfile.TemporaryDirectory(dir=self._parts) as scratch:
            arrived = self._held(entry, scratch)
            if not _is_there(arrived, entry):
                raise _changed(entry, found=_description(arrived))
            _put(arrived, target)
        self._tally.add(entry.size, fetched_bytes=entry.size)

    def _bring_pointed(self, entry: ArtifactFile, target: str) -> None:
        uri = _checked_pointer(entry)
        part = os.path.join(self._parts, entry.sha256)
        ranges = _Ranges(part, size_bytes=entry.size)
        self._tally.add(entry.size - sum(end - start for start, end in ranges.missing()), fetched_bytes=0)
        try:
            self._run([lambda r=r: self._bring_range(uri, r, ranges) for r in ranges.missing()])  # type: ignore[misc]
        finally:
            ranges.close()
        try:
            if not _is_there(part, entry):
                raise _changed(entry, found=_description(part))
            _put(part, target)
        finally:
            ranges.forget()

    def _bring_range(self, uri: str, part: tuple[int, int], ranges: _Ranges) -> None:
        for start in range(*part, _READ_BYTES):
            chunk = storage.read_range(uri, start=start, stop=min(start + _READ_BYTES, part[1]))
            ranges.write(chunk, start)
            self._tally.add(len(chunk), fetched_bytes=len(chunk))
        ranges.finish(part)


class _Ranges:
    """A file that grows in ranges, and which of them are complete, so that another process can go on.

    Args:
        path: of the file; ``path + ".done"`` lists the first byte of each complete range.
        size_bytes: of the whole file.
    """

    def __init__(self, path: str, *, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._done = _read_numbers(path + ".done") if os.path.exists(path) else set()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

    def missing(self) -> list[tuple[int, int]]:
        """First byte and end of each range that is not complete."""
        starts = range(0, self._size_bytes, _RANGE_BYTES)
        return [(start, min(start + _RANGE_BYTES, self._size_bytes)) for start in starts if start not in self._done]

    def write(self, chunk: bytes, start: int) -> None:
        """Writes bytes at their place."""
        os.pwrite(self._file, chunk, start)

    def finish(self, part: tuple[int, int]) -> None:
        """Notes a complete range, once it is on the disk."""
        os.fdatasync(self._file)
        with self._lock, open(self._path + ".done", "a", encoding="ascii") as stream:
            stream.write(f"{part[0]}\n")

    def close(self) -> None:
        """Ends writing; what is there stays."""
        os.close(self._file)

    def forget(self) -> None:
        """Removes what is left of the file."""
        for path in (self._path, self._path + ".done"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _read_numbers(path: str) -> set[int]:
    """The whole lines of a file of numbers; a torn last one does not count."""
    if not os.path.exists(path):
        return set()
    with open(path, encoding="ascii", errors="replace") as stream:
        return {int(line) for line in stream if line.endswith("\n") and line.strip().isdigit()}


def _target(root: str, name: str) -> str:
    """Where a file goes.

    Raises:
        TrackingError: a link in the target folder leads out of it.
    """
    target = os.path.join(root, *name.split("/"))
    inside = os.path.realpath(root)
    parent = os.path.realpath(os.path.dirname(target))
    if os.path.commonpath([inside, parent]) != inside:
        raise TrackingError(
            "a link in the target folder leads out of it",
            where=os.path.dirname(target),
            found=parent,
            expected=f"a folder inside {inside}",
            fix="remove the link, or choose an empty folder",
        )
    return target


def _put(arrived: str, target: str) -> None:
    """Takes a checked file to its place by rename; a link there is replaced, never followed."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.replace(arrived, target)


def _is_there(target: str, entry: ArtifactFile) -> bool:
    if os.path.islink(target) or not os.path.isfile(target) or os.path.getsize(target) != entry.size:
        return False
    return storage.sha256(target) == entry.sha256


def _changed(entry: ArtifactFile, *, found: str) -> TrackingError:
    return TrackingError(
        "an artifact is not what was logged",
        where=entry.uri or entry.name,
        found=found,
        expected=f"{entry.size} bytes, sha256 {entry.sha256}",
        fix="it was changed or damaged after it was logged; the files already there are right",
    )


def _description(path: str) -> str:
    return f"{os.path.getsize(path)} bytes, sha256 {storage.sha256(path)}"


def _num_kept_bytes(parts: str, entries: Sequence[ArtifactFile]) -> int:
    """What an earlier pull has on the disk of these files already; a part is sparse, so its length does not say."""
    sizes = {entry.sha256: entry.size for entry in entries if entry.uri is not None}
    num_bytes = 0
    for name, size in sizes.items():
        with contextlib.suppress(FileNotFoundError):
            num_bytes += min(os.lstat(os.path.join(parts, name)).st_blocks * _BLOCK_BYTES, size)
    return num_bytes


def _require_room(root: str, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(root).free
    if num_bytes > free_bytes:
        raise CapacityError(
            "the disk is too small for these artifacts",
            where=root,
            found=f"{format_bytes(free_bytes)} free",
            expected=format_bytes(num_bytes),
            fix="pull less with --name, or to another disk",
        )


def _checked_pointer(entry: ArtifactFile) -> str:
    """The address of a file outside MLflow, if storage may be asked for it."""
    uri = entry.uri or ""
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme not in _POINTER_SCHEMES or "::" in uri:
        raise TrackingError(
            "an artifact points to an address that is no storage",
            where=entry.name,
            found=uri,
            expected="a path or s3://",
        )
    try:
        num_bytes = storage.size_bytes(uri)
    except FileNotFoundError:
        raise TrackingError(
            "the file that an artifact points to is gone", where=entry.name, found=uri, fix="pull the others by --name"
        ) from None
    if num_bytes != entry.size:
        raise _changed(entry, found=f"{num_bytes} bytes")
    return uri
