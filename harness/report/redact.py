"""What is handed on names no place of a machine and nobody: absolute paths are cut, the names of host and user go.

Relative paths, Hub ids, URLs, labels and fractions stay. A path within an installed package keeps what comes after
site-packages; of any other its last part is left.
"""

from __future__ import annotations

import functools
import getpass
import re
import socket
from contextlib import suppress
from typing import Any

from harness.record.record import RunRecord
from harness.spec import RunSpec

SEGMENT = r"[^\s/\\'\"`:;,<>|]+"
WINDOWS_SEGMENT = r"[^\s/\\'\"`:;,<>|?*]+"
PLACES = re.compile(
    "|".join(
        [
            r"(?<=(['\"`]))(?P<quoted>(?:/|~|[A-Za-z]:[\\/])[^'\"`\n]*)(?=\1)",  # it may have spaces
            r"(?P<url>(?<!\w)(?!file:)[A-Za-z][\w+.-]{1,20}://(?=[^/\s])[^\s'\"`<>]+)",
            r"(?P<person>(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*(?:\.[A-Za-z]{2,}(?!\w)|(?=:[/~])))",
            rf"(?P<windows>(?<![A-Za-z0-9])[A-Za-z]:[\\/]+{WINDOWS_SEGMENT}(?:[\\/]+{WINDOWS_SEGMENT})*[\\/]*)",
            rf"(?P<share>(?<![\w\\])\\{{2,}}[A-Za-z0-9][\w.$-]+(?:\\+{WINDOWS_SEGMENT})+\\*)",
            rf"(?P<tilde>(?<![\w~])~(?:[A-Za-z_][\w.-]*|(?=/))(?:/+{SEGMENT})*/*)",
            # After a sign of a relative path only where it is somebody's home all the same.
            rf"(?P<posix>(?:(?<![\w.~/\\])|(?<=\\[nrt])|(?=/(?:home|Users)/))/+{SEGMENT}(?:/+{SEGMENT})+/*)",
        ]
    )
)
HOMES = re.compile(r"(?:/home/+|/Users/+|[\\/]Users[\\/]+)([^\s/\\'\"`:;,<>|()\[\]{}]+)")
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # of a terminal
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
TELLING_NOTHING = {"root", "user", "users", "host", "localhost", "shared", "public"}


def model_name(model: str | None) -> str | None:
    """A Hub id as it is; of a folder the last part, since where it lies is nobody's business in a table."""
    if model is None or HUB_ID.fullmatch(model):
        return model
    return without_names(last_part(model), this_machine() | names_in(model))


def last_part(path: str) -> str:
    """What is left of a path: what follows site-packages, or the last part; "~" for a home folder."""
    path = path.rstrip("/\\")
    package = re.match(r".*[\\/](?:site|dist)-packages[\\/]+(.+)", path, re.DOTALL)
    if package:
        return package[1]
    parts = re.split(r"[\\/]+", path)
    if len(parts) > 1 and parts[-2] in ("home", "Users"):
        return re.sub(r"[\w.@-]*[\w@-]", "~", parts[-1], count=1)  # a bracket after it stays
    return "~" if parts[-1].startswith("~") else parts[-1]


def cut(value: Any, names: frozenset[str] | None = None) -> Any:
    """A JSON value with absolute paths cut in all its strings and keys, and `names` (None: of this machine) left out
    of the strings that held one."""
    if isinstance(value, str):
        return _cut_text(value, this_machine() if names is None else names)
    if isinstance(value, list | tuple):
        return [cut(item, names) for item in value]
    if isinstance(value, dict):
        made: dict[str, Any] = {}
        for key, item in value.items():
            name = cut(str(key), names)
            while name in made:
                name += "'"
            made[name] = cut(item, names)
        return made
    return value


def cut_config(value: Any) -> Any:
    """`cut` of a configuration file's JSON; a model's folder becomes its name."""
    if isinstance(value, list):
        return [cut_config(item) for item in value]
    if not isinstance(value, dict):
        return cut(value)
    return {
        cut(key): model_name(item) if key.endswith("name_or_path") and isinstance(item, str) else cut_config(item)
        for key, item in value.items()
    }


def plain_text(text: str, names: frozenset[str] | None = None) -> str:
    """Free text, such as an error, without absolute paths and without `names` (None: of this machine and of the home
    folders in the text)."""
    names = this_machine() | names_in(text) if names is None else names
    return without_names(_cut_text(COLOURS.sub("", text), names), names)


def handed_on(record: RunRecord) -> RunRecord:
    """The record as it may leave the machine: without places, without the names of host and user.

    It stays a record that can be read. Where a parameter held a path, of which its run_id was made, the record gets the
    run_id of what is left and a note with its old one.
    """
    place, names = record.spec.place, _names_of(record)
    content = cut(record.model_dump(mode="json"), names)
    content["spec"]["place"] |= {
        "data_root": None,
        "model": place.model and model_name(place.model),
        "path": place.path and without_names(last_part(place.path), names),
        "forgetting": place.forgetting and without_names(last_part(place.forgetting), names),
        "device": plain_text(place.device, names),
    }
    environment = record.environment.model_copy(
        update={"platform": record.environment.platform.partition("-")[0]}  # its kind alone
    )
    told = record.model_copy(update={"environment": environment}).model_dump(mode="json")
    for name in ("environment", "data", "notes", "error", "traceback", "started"):
        content[name] = _plain(told[name], record, names)
    content["run_id"] = record.run_id
    identity = RunSpec.model_validate(content["spec"]).run_id
    if identity != record.spec.run_id:
        content["run_id"] = identity
        content["notes"] += [f"the run was {record.run_id}: paths were cut from its parameters"]
    return RunRecord.model_validate(content)


def error_text(record: RunRecord) -> str | None:
    """Why the run failed, as tables may say it."""
    return None if record.error is None else str(_plain(record.error, record, _names_of(record)))


def one_line(text: str) -> str:
    """The text in one line, with a question mark for each sign that cannot be printed."""
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))


@functools.cache
def this_machine() -> frozenset[str]:
    """Names of this machine and of its user."""
    host = socket.gethostname()
    names = {host, host.partition(".")[0]}
    with suppress(OSError, KeyError, ImportError):  # a user without an entry
        names.add(getpass.getuser())
    return _telling(names)


def names_in(text: str) -> frozenset[str]:
    """Whose home folders a text names."""
    return _telling(set(HOMES.findall(text)))


def without_names(text: str, names: frozenset[str]) -> str:
    """The text with every name, as a whole word, become "someone"."""
    if not any(name.lower() in text.lower() for name in names):
        return text
    words = "|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name))))
    return re.sub(rf"(?<!\w)(?:{words})(?!\w)", "someone", text, flags=re.IGNORECASE)


def _telling(names: set[str]) -> frozenset[str]:
    return frozenset(name for name in names if len(name) > 1 and name.lower() not in TELLING_NOTHING)


def _names_of(record: RunRecord) -> frozenset[str]:
    return this_machine() | names_in(record.model_dump_json())


def _plain(value: Any, record: RunRecord, names: frozenset[str]) -> Any:
    """`plain_text` of all strings of a JSON value. The record's own places are known, even with a space in them."""
    if isinstance(value, list):
        return [_plain(item, record, names) for item in value]
    if isinstance(value, dict):
        return {cut(key, names): _plain(item, record, names) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    place = record.spec.place
    for path in (place.data_root, place.model, place.path):
        if path and re.search(r"[\s'\"`:;,<>|]", path):
            value = value.replace(path.rstrip("/\\"), last_part(path))
    return plain_text(value, names)


@functools.lru_cache(maxsize=4096)
def _cut_text(text: str, names: frozenset[str]) -> str:
    if not re.search(r"[/\\~@]", text):
        return text
    made = PLACES.sub(_left, text)
    return made if made == text else without_names(made, names | names_in(text))


def _left(found: re.Match[str]) -> str:
    """What stays of one match."""
    text = found[0]
    if found["url"]:
        return re.sub(r"://[^/@\s]*@", "://", text)
    if found["person"]:
        return "someone"
    if found["quoted"] and len(re.findall(r"[\\/]+[^\\/]", text)) < 2 and not text.startswith("~"):
        return text if text.startswith("/") else last_part(text)
    return last_part(text)
