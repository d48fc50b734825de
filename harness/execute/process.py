"""What every process of ours sets before torch is imported."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_environment() -> None:
    """Threads that wait must not spin (measured: sevenfold slower on busy cores); libraries speak only of errors.

    Set before torch is imported; a user's own settings win.
    """
    for name, value in {
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    # It tells of a kernel that it has no use for, where PEFT imports it, and of casts to fp16 at every step.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT asks transformers for a property by its old name, once a run.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
