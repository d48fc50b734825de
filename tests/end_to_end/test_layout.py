"""The directions of imports, and what must be nowhere in the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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


# What methods and tasks may import of the harness: its vocabulary, the files at its top.
FOR_METHODS = {"method", "optimizer", "passes", "errors", "parameters", "spec", "storage"}
FOR_TASKS = {"task", "metric", "splits", "method", "errors", "parameters", "storage"}
# The rooms in the order of the flow: each may import those after it, and the vocabulary.
FLOW = ["commands", "plan", "execute", "run", "report", "record"]


def parts(names: set[str]) -> set[str]:
    """The first part below harness of each name."""
    return {name.split(".")[1] for name in names if name.startswith("harness.")}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_directions(path):
    names, place = of_project(path), path.relative_to(ROOT)
    top = place.parts[0]
    if top == "methods":
        assert parts(names) <= FOR_METHODS
        assert within(names, "harness", "methods")
    elif top == "tasks":
        assert parts(names) <= FOR_TASKS
        assert within(names, "harness", "tasks")
    else:
        assert within(names, "harness"), "the harness finds methods and tasks by name only"
    if place.parent.name == "math":
        assert not names
    if place.name == "training.py":
        assert parts(names) <= {"errors", "method", "spec", "task", "run"}
    if place.parts[:2] == ("harness", "report"):
        assert parts(names) <= {"report", "record", "spec", "metric", "trace", "errors", "notation", "storage"}
        assert not within({"torch"}, *imported(path))


@pytest.mark.parametrize("room", FLOW)
def test_rooms_follow_the_flow(room):
    before = set(FLOW[: FLOW.index(room)])
    for path in (ROOT / "harness" / room).rglob("*.py"):
        assert not parts(of_project(path)) & before, relative(path)


def test_the_vocabulary_knows_no_room():
    """But for the two doors, which open on everything: the command line and `python -m harness`."""
    for path in (ROOT / "harness").glob("*.py"):
        if path.name not in ("cli.py", "__main__.py"):
            assert not parts(of_project(path)) & {*FLOW, "contracts", "cli"}, relative(path)


def test_no_module_imports_itself_by_way_of_another():
    """Imports within functions count, those for type checking do not."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    arrows = {name: (imported(path) & modules.keys()) - {name} for name, path in modules.items()}
    while free := {name for name, targets in arrows.items() if not targets}:
        arrows = {name: targets - free for name, targets in arrows.items() if name not in free}
    assert not arrows


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
