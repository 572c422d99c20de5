from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def mlflow_alone(mlflow_environment: None) -> None:
    """Every test here meets only the MLflow that it starts."""
