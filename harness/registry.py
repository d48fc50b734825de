"""Methods and tasks by name: entry points, loaded when asked for. Nothing is imported for a listing of names."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError, unknown
from harness.method import Method
from harness.notation import label
from harness.provenance import ALLOWED, GROUPS, NOT_STATED, is_allowed
from harness.task import Task
from harness.trace import Trace

if TYPE_CHECKING:
    from harness.spec import RunSpec

METHODS, TASKS = "harness.methods", "harness.tasks"
COLUMNS, PICTURES = "harness.columns", "harness.pictures"  # of packages, beside the report's own
KINDS = {METHODS: "method", TASKS: "task", COLUMNS: "column", PICTURES: "picture"}


@functools.cache
def registered(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points of a group by name, sorted; several where packages claim one name for different objects."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        found.setdefault(entry.name, {}).setdefault(entry.value, entry)
    return {name: tuple(claims.values()) for name, claims in found.items()}


def method_class(name: str) -> type[Method]:
    """The class registered as `name`. Raises InputError for an unknown name, one that packages contend for, or one
    whose class cannot be imported or used."""
    loaded = _load(METHODS, name)
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise InputError(f"method '{name}' is {loaded!r}, which is not a subclass of harness.method.Method")
    return loaded


def task_class(name: str) -> type[Task]:
    """The class behind "family", "family/member" or "family:PATH". Raises InputError as `method_class` does."""
    family, member, path = _parts(name)
    if family not in registered(TASKS):
        raise unknown("task", family or name, registered(TASKS))
    loaded = _load(TASKS, family)
    if not (isinstance(loaded, type) and issubclass(loaded, Task)):
        raise InputError(f"task '{family}' is {loaded!r}, which is not a subclass of harness.task.Task")
    if member is not None and member not in loaded.members:
        raise unknown("task", name, [f"{family}/{known}" for known in loaded.members] or [family])
    if path is not None and "path" not in loaded.model_fields:
        raise InputError(f"task '{family}' takes no path: '{name}' is not allowed; write {family}", name)
    return loaded


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """(family, member, path) of a task's name; None for what it does not have."""
    family, colon, path = name.partition(":")
    family, slash, member = family.partition("/")
    return family, member if slash else None, path if colon else None


def task_names(name: str) -> list[str]:
    """The tasks that a name stands for: all members of a family, or the name itself."""
    members = task_class(name).members
    return [name] if _parts(name)[1] is not None or not members else [f"{name}/{member}" for member in members]


def make_method(name: str, parameters: dict[str, Any]) -> Method:
    """The method with these hyperparameters. Raises InputError for a wrong one; for one that it lacks, with the methods
    that have it."""
    method = method_class(name)
    try:
        return method.of(parameters, owner=name)
    except InputError as error:
        lacking = next((key for key in parameters if key not in _names(method)), None)
        having = [] if lacking is None else [other for other in registered(METHODS) if _has(other, lacking)]
        if not having:
            raise
        raise InputError(f"{error} Methods with '{lacking}': {', '.join(having)}.", lacking) from None


def _names(method: type[Method]) -> set[str]:
    """The names of a method's parameters, PEFT's too."""
    return {*method.model_fields, *method.peft_names()}


def _has(name: str, parameter: str) -> bool:
    """Whether the method registered as `name` has the parameter; one that cannot be loaded has none."""
    try:
        return parameter in _names(method_class(name))
    except InputError:
        return False


def label_of(name: str, parameters: dict[str, Any]) -> str:
    """A method with those of its parameters that cannot be left out: "debora[geometry=oblique]"."""
    return label(name, shown_parameters(name, parameters))


def shown_parameters(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that would have another value if they were left out, in the method's order.

    Those are the ones that are not at their default, but for defaults that follow from another parameter.
    """
    defaults = method_class(name).defaults()
    parameters = method_class(name).in_todays_words(parameters)
    order = [*(key for key in defaults if key in parameters), *(key for key in parameters if key not in defaults)]
    shown = {key: parameters[key] for key in order if parameters[key] != defaults.get(key)}
    shown = {key: value for key, value in shown.items() if not _follows(name, json.dumps(shown), key)}
    made = _made(name, json.dumps(shown))
    # A default that follows from another parameter may hide that this one is at its own.
    hidden = {key for key, value in made.items() if key in parameters and parameters[key] != value}
    return {key: parameters[key] for key in order if key in shown or key in hidden}


def _follows(name: str, parameters: str, key: str) -> bool:
    """Whether a parameter (of some, as JSON) gets the value that it has without being given."""
    given: dict[str, Any] = json.loads(parameters)
    value = given.pop(key)
    made = _made(name, json.dumps(given))
    return key in made and bool(made[key] == value)


@functools.cache
def _made(name: str, parameters: str) -> dict[str, Any]:
    """Every parameter of the method that is given these, as JSON; {} where some are missing, or of another version."""
    try:
        return method_class(name).of(json.loads(parameters), owner=name).model_dump(mode="json")
    except InputError:
        return {}


def make_task(name: str, parameters: dict[str, Any], path: str | None = None) -> Task:
    """The task: "family", "family/member" or "family:PATH"; `path` wins over the one in the name.

    Raises InputError for a wrong parameter.
    """
    family, member, given = _parts(name)
    for key, written in (("member", f"{family}/member"), ("path", f"{family}:PATH")):
        if key in parameters:
            raise InputError(f"parameter '{key}' of {family} is set by the task's name: write {written}", key)
    cls, path = task_class(name), path if path is not None else given
    try:
        if path and Path(path).expanduser().exists():
            path = str(Path(path).expanduser().absolute())  # workers may be in another folder
    except (OSError, RuntimeError) as error:  # no permission, too long a name; no such user
        raise InputError(f"path '{path}' of task '{family}' cannot be looked up: {error}", path) from None
    if "path" in cls.model_fields and not path:
        raise InputError(f"task '{family}' needs to know your data: write {family}:PATH", name)
    named = {"member": member, "path": path}
    return cls.of({**parameters, **{key: value for key, value in named.items() if value}}, owner=name)


def task_of(spec: RunSpec) -> Task:
    """The task of a run. Raises InputError as `make_task` does."""
    return make_task(spec.task, spec.task_parameters, spec.place.path)


def task_name(name: str) -> str:
    """What records and tables call a task: a path is cut down to the name of its file or folder, so that a run is the
    same wherever its data are ("text:/data/reviews.csv" -> "text:reviews")."""
    family, colon, path = name.partition(":")
    return f"{family}:{Path(path).expanduser().resolve().stem}" if colon else name


def task_parameters(task: Task) -> dict[str, Any]:
    """A task's parameters with defaults, as JSON values; `make_task` takes them back."""
    return task.model_dump(mode="json", exclude={"member", "path"})


def extensions(group: str) -> tuple[dict[str, object], list[str]]:
    """What packages add to the report, by name, and a line for each that cannot be imported: it costs no report."""
    found: dict[str, object] = {}
    told = []
    for name in registered(group):
        try:
            found[name] = _load(group, name)
        except InputError as error:
            told.append(str(error))
    return found, told


@functools.cache
def _load(group: str, name: str) -> object:
    if name not in registered(group):
        raise unknown(KINDS[group], name, registered(group))
    entry, *others = registered(group)[name]
    if others:
        raise InputError(
            f"the name '{name}' in {group} is claimed twice, by {entry.value} and {others[0].value}: "
            "uninstall one of the packages"
        )
    with plugin_errors(group, name, "imported"):
        loaded = entry.load()
    with plugin_errors(group, name, "used"):
        if isinstance(loaded, type) and issubclass(loaded, (Method, Task)):
            if inspect.isabstract(loaded):
                raise TypeError(f"{loaded.__name__} does not define {', '.join(sorted(loaded.__abstractmethods__))}")
            if issubclass(loaded, Task) and loaded.headline is Task.headline and not loaded.measures:
                raise TypeError(f"{loaded.__name__} declares no metric: it needs `measures` or its own `headline`")
            if issubclass(loaded, Method) and not all(isinstance(trace, Trace) for trace in loaded.traces):
                raise TypeError(f"{loaded.__name__}.traces is {loaded.traces!r}, which are no harness.trace.Trace")
            if issubclass(loaded, Method):
                _check_words(loaded)
            loaded.defaults()  # raises for what is no JSON, as in a record
            _ = ", ".join((*loaded.capabilities, *getattr(loaded, "members", ())))  # raises for other than words
    return loaded


def _check_words(method: type[Method]) -> None:
    """Raises TypeError for a provenance or a group that nobody knows."""
    if method.provenance != NOT_STATED and not is_allowed(method.provenance):
        raise TypeError(f"{method.__name__}.provenance is {method.provenance!r}; allowed are {ALLOWED}")
    if method.group not in GROUPS:
        raise TypeError(f"{method.__name__}.group is {method.group!r}; known are {', '.join(GROUPS)}")


@contextmanager
def plugin_errors(group: str, name: str, done: str) -> Iterator[None]:
    """What a plugin's own code raises, be it SystemExit, becomes an InputError of one line that names the plugin.
    `done`: what cannot be done with it."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        entry = registered(group)[name][0]
        package = entry.dist.name if entry.dist else entry.value
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{KINDS[group]} '{name}' of package {package} cannot be {done}: {reason}") from error
