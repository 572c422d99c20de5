from __future__ import annotations

from collections.abc import Iterator

import pytest

from raydist.runtime.cluster import connected
from tests.training.cases import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One embedded Ray for all tests of the session; ends with it."""
    with connected(address=None, min_cpus=2):
        yield
