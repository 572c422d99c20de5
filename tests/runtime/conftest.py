from __future__ import annotations

import pytest

from tests.training.cases import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def others(ray_cluster: None) -> set[str]:
    """Actors of earlier tests on the same cluster."""
    from tests.runtime.sweeps import actors

    return set(actors())
