from __future__ import annotations

import pytest

from tests.training.cases import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def uneven_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Records whose first 0, 200 or 400 of 500 characters are a prompt without loss."""
    return write_dataset(tmp_path_factory.mktemp("uneven"), prompt_chars=200)
