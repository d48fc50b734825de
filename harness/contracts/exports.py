"""What every method's export must keep to."""

from __future__ import annotations

import pkgutil

from harness.contracts.subject import Subject, start
from harness.run import checkpoint


def nothing_is_pickled(subject: Subject) -> None:
    """Checkpoints and exports are safetensors, JSON and text, and there is something that loads an export."""
    started = start(subject)
    started.training.run(lambda training: None)
    checkpoint.save(subject.folder / "checkpoint", started.training.used, started.training.state_dict())
    started.adaptation.export(subject.folder / "export")
    files = [path for path in subject.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}, files
    assert any(path.suffix == ".safetensors" for path in (subject.folder / "export").rglob("*"))
    names = {path.name for path in (subject.folder / "export").iterdir()}
    loaders = started.method.loaders
    assert names & {"adapter_config.json", "trained.safetensors", *loaders}, "nothing says how this is loaded"
    for loader in loaders.values():
        assert callable(pkgutil.resolve_name(loader)), loader
