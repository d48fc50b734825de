"""`list`: what there is, and what each thing's parameters are. Imports no torch."""

from __future__ import annotations

import inspect
import tomllib
from typing import Any

from pydantic_core import PydanticUndefined

from harness import registry
from harness.errors import InputError, unknown
from harness.method import Method
from harness.parameters import Strict
from harness.plan import sweep_file
from harness.provenance import GROUPS

OWN_FORMAT = "own format, which stock PEFT cannot load"


def command(name: str | None) -> int:
    """Print everything that is registered, or one thing's parameters. Raises InputError for an unknown name."""
    if name is None:
        _print_all()
    elif name in registry.registered(registry.METHODS):
        method = registry.method_class(name)
        with registry.plugin_errors(registry.METHODS, name, "described"):
            text = "\n".join([*_parameters(name, method), *method.details()])
        print(text)
    elif name in sweep_file.presets():
        print(sweep_file.preset(name).read_text().strip())
    elif (family := name.partition("/")[0]) in registry.registered(registry.TASKS):
        task = registry.task_class(name)
        with registry.plugin_errors(registry.TASKS, family, "described"):
            text = "\n".join(_parameters(name, task))
        print(text)
    else:
        known = [*registry.registered(registry.METHODS), *registry.registered(registry.TASKS), *sweep_file.presets()]
        raise unknown("method, task or preset", name, known)
    return 0


def _print_all() -> None:
    groups: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
    for name in registry.registered(registry.METHODS):
        groups[_group(name)].append((name, _one_line(registry.METHODS, name)))
    for group, rows in groups.items():
        if rows:
            _print_table(f"methods, {group}: {GROUPS[group]}", rows)
    rows = [(name, _one_line(registry.TASKS, name)) for name in registry.registered(registry.TASKS)]
    _print_table("tasks:", rows)
    rows = [(name, tomllib.loads(path.read_text())["description"]) for name, path in sweep_file.presets().items()]
    _print_table("presets:", rows)
    print("`list NAME` shows a method's or a task's parameters, or a preset's content.")


def _print_table(heading: str, rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    print(heading)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
    print()


def _group(name: str) -> str:
    """The method's group; that of a method without one for a plugin that cannot be used."""
    try:
        return registry.method_class(name).group
    except InputError:
        return Method.group


def _one_line(group: str, name: str) -> str:
    """The first line of the docstring and the capabilities; a plugin that cannot be used says why."""
    try:
        cls: Any = registry.method_class(name) if group == registry.METHODS else registry.task_class(name)
        with registry.plugin_errors(group, name, "described"):
            first = next(iter((cls.__doc__ or "").strip().splitlines()), "(no description)")
    except InputError as error:
        return f"(unavailable: {error})"
    members = f" Members: {', '.join(cls.members)}." if getattr(cls, "members", ()) else ""
    capabilities = f" [{', '.join(cls.capabilities)}]" if cls.capabilities else ""
    if group == registry.TASKS:
        return f"{first}{members}{capabilities}"
    export = f" Export: {OWN_FORMAT}." if cls.own_format else ""
    return f"{first}{capabilities}{export} Provenance: {cls.provenance}."


def _parameters(name: str, cls: type[Strict]) -> list[str]:
    kind = "hyperparameter" if issubclass(cls, Method) else "parameter"
    lines = [inspect.cleandoc(cls.__doc__ or "")]
    if issubclass(cls, Method):
        lines.append(f"\nprovenance: {cls.provenance}\ngroup: {cls.group}")
        lines += [f"export: {OWN_FORMAT}"] if cls.own_format else []
    lines += [f"\n{kind}s, as in {name}[{kind}=value]:"]
    schema = cls.model_json_schema()["properties"]
    of_peft = {name: peft_name for peft_name, name in cls.peft_names().items()}
    for field, information in cls.model_fields.items():
        if field == "member":
            continue
        default = "required" if information.default is PydanticUndefined else f"default {information.default}"
        name = f"{field} (PEFT's {of_peft[field]})" if field in of_peft else field
        lines.append(f"  {name}: {information.description or ''} ({_allowed(schema[field])}{default})")
    return lines


def _allowed(schema: dict[str, Any]) -> str:
    """A field's choices or range from its JSON schema."""
    if "enum" in schema:
        return f"{' | '.join(map(str, schema['enum']))}; "
    names = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    options = [schema, *schema.get("anyOf", [])]
    limits = [f"{sign} {option[key]}" for option in options for key, sign in names.items() if key in option]
    return f"{', '.join(limits)}; " if limits else ""
