"""Settings for every test: no Hub, one thread, before torch is imported."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HARNESS_CACHE"] = tempfile.mkdtemp(prefix="harness-cache-")
atexit.register(shutil.rmtree, os.environ["HARNESS_CACHE"], ignore_errors=True)
os.environ["HARNESS_TRACKING_URI"] = "off"  # MLflow takes seconds to begin; its own tests name a database
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
