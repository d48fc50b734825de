"""Settings for every test: no Hub, one thread, before torch is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HARNESS_TRACKING_URI"] = "off"  # MLflow takes seconds to begin; its own tests name a database
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
