"""The directions of imports, and what must be nowhere in the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("harness", "methods", "tasks") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, type checking left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def of_project(path: Path) -> set[str]:
    return {name for name in imported(path) if name.split(".")[0] in ("harness", "methods", "tasks")}


def within(names: set[str], *allowed: str) -> bool:
    return all(any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed) for name in names)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_directions(path):
    names, place = of_project(path), path.relative_to(ROOT)
    top = place.parts[0]
    if top == "methods":
        allowed = ("method", "optimizer", "errors", "parameters", "spec", "storage")
        assert within(names, *(f"harness.{name}" for name in allowed), "methods")
    elif top == "tasks":
        allowed = ("task", "splits", "method", "errors", "parameters", "storage")
        assert within(names, *(f"harness.{name}" for name in allowed), "tasks")
    else:
        assert within(names, "harness"), "the harness finds methods and tasks by name only"
    if place.name in ("frank_wolfe.py", "hypergradient.py", "manifolds.py"):
        assert not names
    if place.name == "training.py":
        assert within(names, "harness.errors", "harness.method", "harness.spec", "harness.task")
    if place.parts[:2] == ("harness", "report"):
        allowed = ("report", "record", "record_store", "running", "process", "spec", "errors", "storage")
        assert within(names, *(f"harness.{name}" for name in allowed))
        assert not within({"torch"}, *imported(path))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_pickle_and_no_names_of_methods_in_the_harness(path):
    text = path.read_text()
    assert not imported(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    assert not re.search(r"torch\.(load|save)\(", text)
    if path.relative_to(ROOT).parts[0] == "harness" and path.name != "cli.py":  # its examples name some
        strings = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
        assert not strings & {"lora", "debora", "full", "adalora", "glue", "cifar10", "rotten_tomatoes"}


def test_tensors_are_saved_by_the_one_helper():
    """It makes an OSError of a full disk, which safetensors' own functions do not."""
    saving = {f"safetensors.{kind}.{name}" for kind in ("torch", "numpy") for name in ("save_file", "save_model")}
    saving |= {"safetensors.serialize_file"}
    assert [
        name for path in FILES if imported(path) & saving and (name := relative(path)) != "harness/storage.py"
    ] == []


def test_files_stay_readable():
    long = [relative(path) for path in FILES if len(path.read_text().splitlines()) > 320]
    assert not long
