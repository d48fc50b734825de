"""Methods and tasks by name: entry points, loaded when asked for. Nothing is imported for a listing of names."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from harness.errors import InputError, unknown
from harness.method import Method
from harness.spec import label
from harness.task import Task

METHODS, TASKS = "harness.methods", "harness.tasks"


@functools.cache
def registered(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name, sorted. Raises InputError where two packages claim one name."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        if found.setdefault(entry.name, entry).value != entry.value:
            raise InputError(
                f"the name '{entry.name}' in {group} is claimed twice, by {found[entry.name].value} and {entry.value}: "
                "uninstall one of the packages"
            )
    return found


def method_class(name: str) -> type[Method]:
    """The class registered as `name`. Raises InputError for an unknown name or one that cannot be imported."""
    loaded = _load(METHODS, "method", name)
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise InputError(f"method '{name}' is {loaded!r}, which is not a subclass of harness.method.Method")
    return loaded


def task_class(name: str) -> type[Task]:
    """The class behind "family" or "family/member". Raises InputError for an unknown name."""
    family, slash, member = name.partition("/")
    if family not in registered(TASKS):
        raise unknown("task", family, registered(TASKS))
    loaded = _load(TASKS, "task", family)
    if not (isinstance(loaded, type) and issubclass(loaded, Task)):
        raise InputError(f"task '{family}' is {loaded!r}, which is not a subclass of harness.task.Task")
    if slash and member not in loaded.members:
        raise unknown("task", name, [f"{family}/{known}" for known in loaded.members] or [family])
    return loaded


def task_names(name: str) -> list[str]:
    """The tasks that a name stands for: all members of a family, or the name itself."""
    members = task_class(name).members
    return [name] if "/" in name or not members else [f"{name}/{member}" for member in members]


def make_method(name: str, parameters: dict[str, Any]) -> Method:
    """The method with these hyperparameters. Raises InputError for a wrong one."""
    return method_class(name).of(parameters, owner=name)


def label_of(name: str, parameters: dict[str, Any]) -> str:
    """A method with those of its parameters that are not at their default: "debora[tau=8]"."""
    defaults = method_class(name).defaults()
    return label(name, {key: value for key, value in parameters.items() if value != defaults.get(key)})


def make_task(name: str, parameters: dict[str, Any]) -> Task:
    """The task ("family/member" for a member of a family). Raises InputError for a wrong parameter."""
    member = name.partition("/")[2]
    if "member" in parameters:
        raise InputError(f"parameter 'member' of {name} is set by the task's name: write family/member", "member")
    return task_class(name).of({**parameters, **({"member": member} if member else {})}, owner=name)


def task_parameters(task: Task) -> dict[str, Any]:
    """A task's parameters with defaults, as JSON values; `make_task` takes them back."""
    return task.model_dump(mode="json", exclude={"member"})


def _load(group: str, kind: str, name: str) -> object:
    entries = registered(group)
    if name not in entries:
        raise unknown(kind, name, entries)
    try:
        return entries[name].load()
    except Exception as error:
        package = entries[name].dist
        origin = package.name if package else entries[name].value
        raise InputError(f"{kind} '{name}' of package {origin} cannot be imported: {error}") from error
