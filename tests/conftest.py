"""Settings for every test: no Hub, one thread, before torch is imported."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HARNESS_CACHE"] = tempfile.mkdtemp(prefix="harness-cache-")
atexit.register(shutil.rmtree, os.environ["HARNESS_CACHE"], ignore_errors=True)
os.environ["HARNESS_TRACKING_URI"] = "off"  # MLflow takes seconds to begin; its own tests name a database
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


FROZEN_WITH = [0]  # modules that were imported when objects were last set aside


def pytest_runtest_setup() -> None:
    """Every run collects garbage, and would look through all that torch and others have made when they were imported,
    for a third of a second each time. What is there whenever a test has imported more is set aside."""
    if len(sys.modules) != FROZEN_WITH[0]:
        gc.collect()
        gc.freeze()
        FROZEN_WITH[0] = len(sys.modules)
