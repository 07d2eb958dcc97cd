"""Settings of the whole suite: how many examples Hypothesis makes, and the same ones each time in CI."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Several workers share the cores, so torch's threads would only wait for each other (OpenMP waits busily).
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "bounded",
    max_examples=40,
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("bounded")
