"""The task's parameters in these tests."""

from pathlib import Path

SUBJECT, CLASS = "a photo of a sks three", "a photo of a three"
SETTINGS = {"instance_prompt": SUBJECT, "resolution": 16, "draws": 2, "samples": 2, "sampling_steps": 3}
PRIOR = {"class_prompt": CLASS}


def named(path: Path, **settings) -> str:
    """The task as the command line names it."""
    return f"dreambooth:{path}[{','.join(f'{key}={value}' for key, value in settings.items())}]"
