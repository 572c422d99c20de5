"""Servers that tests share; each starts when the first test asks for it."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.object_store import ObjectStore


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server for the whole session; tests that stop or freeze it start their own."""
    store = ObjectStore(tmp_path_factory.mktemp("object_store"))
    store.start()
    yield store
    store.kill()


@pytest.fixture
def s3_proxy(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the session's S3 server; this process and its children use it."""
    with FaultyProxy(object_store.endpoint) as proxy:
        for key, value in object_store.environment(endpoint=proxy.endpoint).items():
            monkeypatch.setenv(key, value)
        yield proxy


@pytest.fixture
def s3(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The session's S3 server, with its address and credentials in the environment."""
    for key, value in object_store.environment().items():
        monkeypatch.setenv(key, value)
    return object_store


@pytest.fixture
def bucket(s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket; what this process and its children put into temporary and cache folders lands below ``tmp_path``."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node1"))
    return s3.make_bucket(f"run-{uuid.uuid4().hex[:12]}")
