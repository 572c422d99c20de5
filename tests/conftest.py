from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Shared and busy machines: a slow draw says nothing about the code.
settings.register_profile("raydist", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raydist")

os.environ.setdefault("OMP_NUM_THREADS", "1")
