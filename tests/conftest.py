from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.runtime.shared_ray import SharedRay

# Shared and busy machines: a slow draw says nothing about the code.
settings.register_profile("raydist", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raydist")

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A script that runs the tests behind `&` ignores Ctrl-C, and so would all commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.servers.fixtures", "tests.servers.mlflow_fixtures"]


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[SharedRay]:
    """Ends with the session."""
    shared = SharedRay()
    yield shared
    shared.stop()


@pytest.fixture
def ray_cluster(shared_ray: SharedRay) -> None:
    """One embedded Ray for all tests marked ``ray``, which run in one process."""
    shared_ray.begin()
