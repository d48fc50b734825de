"""The command line: run, status, list, validate, report, compare, advise, diff, export, import-peft."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.commands import advise_options, peft_options, report_options
from harness.errors import InputError, one_line, plain, unknown
from harness.execute import stopping
from harness.execute.process import quiet_environment
from harness.parameters import Strict, checked_path
from harness.spec import Execution, Place, TrainSpec
from harness.storage import check_results

DESCRIPTION = """\
Compare fine-tuning methods on equal terms: same data order, same budget in batches, several seeds, honest
parameter counts. A comparison is methods x tasks x seeds x grid; every cell becomes a record on disk, and the
tables and pictures are made from the records. Running a comparison again runs only what is missing."""

EXAMPLES = """\
examples:
  python -m harness list                                what there is: methods, tasks, presets
  python -m harness list debora                         one method's parameters, with defaults and ranges
  python -m harness run --preset quickstart             a first real comparison, in minutes
  python -m harness run --methods lora,debora --tasks glue/cola --seeds 3 --dry-run
  python -m harness run --methods "lora[rank=4],debora" --grid debora.tau=4,8,16 --tasks rotten_tomatoes
  python -m harness report                              tables, pictures and a page from the records
  python -m harness compare debora lora                 is it better, and how sure is that?
  python -m harness advise --margin 0.01                the smallest that is as good as the best, for PEFT"""


LONGEST_URI = 2000
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 where runs failed, 2 for bad input, 130 after an interrupt."""
    try:
        stopping.take_signals()
        stopping.open_streams()
        quiet_environment()
        code = _carry_out(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return stopping.told()
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        stopping.drop_output()
        return 0
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        stopping.drop_output()  # where it is a file on a full disk
        print(f"error: what is printed cannot be written ({error.strerror})", file=sys.stderr)
        return 2


def _carry_out(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if hasattr(options, "results"):
        check_results(options.results)
    return int(options.command(options))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, as for every bad input."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            given = message.removeprefix(prefix)
            kind = "option" if given.startswith("--") else "argument"
            message = str(unknown(kind, given.split("=")[0].split(" ")[0], self._known_options()))
        if wrong := re.match(r"argument COMMAND: invalid choice: '(.*?)'", message, re.DOTALL):
            message = str(unknown("command", wrong[1], self._commands()))
        print(f"error: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _known_options(self) -> set[str]:
        return {name for action in self._all_actions() for name in action.option_strings if name.startswith("--")}

    def _all_actions(self) -> list[argparse.Action]:
        return [*self._actions, *(action for parser in self._commands().values() for action in parser._actions)]

    def _commands(self) -> dict[str, argparse.ArgumentParser]:
        """The commands' parsers by name; none on a command's own parser."""
        groups = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return {name: parser for group in groups for name, parser in group.choices.items()}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m harness",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_run(commands)
    _add_results(
        _command(
            commands,
            "status",
            "how far the last sweep is: its cells, what is running, time to go",
            _calls("status", "results"),
        )
    )
    listing = _command(
        commands, "list", "methods, tasks and presets; with a name, its parameters", _calls("listing", "name")
    )
    listing.add_argument("name", nargs="?", help="a method, a task or a preset")
    validation = _command(
        commands, "validate", "check a sweep file (.toml) or a record (record.json)", _calls("validate", "file")
    )
    validation.add_argument("file", type=_path)
    submission = _command(commands, "export-glue", "test predictions of finished runs as GLUE's submission", _glue)
    submission.add_argument("runs", nargs="+", metavar="RUN", help="run ids, one run a task, made with --predict-test")
    submission.add_argument("--to", type=_path, default=Path("glue.zip"), metavar="FILE", help="default glue.zip")
    _add_results(submission)
    _add_report(commands)
    text = "what PEFT reports of its own method comparison, as a table of its own"
    published = _command(commands, "import-peft", text, _calls("import_peft", "folder", "to"))
    peft_options.add_import(published, _path)
    text = "is one configuration better than another, and how sure is that?"
    comparison = _command(commands, "compare", text, _calls("compare", "results", "first", "second", "tasks"))
    for place in ("first", "second"):
        comparison.add_argument(
            place, help="a row of the leaderboard: debora[tau=8], or a method that has one row; several with commas"
        )
    comparison.add_argument("--tasks", type=_names, help="only these tasks")
    _add_results(comparison)
    text = "the smallest configuration that is not worse than the best, ready for PEFT"
    advice = _command(commands, "advise", text, _calls("advise", "results", "methods", "tasks", "margin", "to"))
    advise_options.add(advice, _path)
    _add_selection(advice)
    difference = _command(commands, "diff", "how two runs differ: spec, versions, metrics, ranks", _diff)
    difference.add_argument("runs", nargs=2, metavar="RUN_ID")
    _add_results(difference)
    text = "a trained adapter with its model card and record, or an experiment for PEFT's own comparison"
    export = _command(commands, "export", text, _calls("export", "results", "run", "to", "rank", "form"))
    peft_options.add_export(export, _path)
    _add_results(export)
    return parser


def _add_report(commands: Any) -> None:
    report = _command(commands, "report", "rebuild tables, pictures and the page from the records", _report)
    _add_selection(report)
    report_options.add_to(report, _path)
    _add_tracking(report)


def _command(commands: Any, name: str, text: str, function: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(command=function)
    return parser


def _add_run(commands: Any) -> None:
    run = _command(commands, "run", "run a comparison, or what is missing of it", _run)
    what = run.add_argument_group("what to compare (each also a key of --config files)")
    what.add_argument(
        "--methods", type=_names, metavar="A,B", help='methods, parameters in brackets: "debora[tau=8,rank=8],lora"'
    )
    what.add_argument(
        "--tasks",
        type=_names,
        metavar="A,B",
        help="tasks: glue/cola; a family for its members: glue; own data: text:PATH, the path in double quotes "
        "where it holds commas or brackets",
    )
    what.add_argument("--seeds", metavar="N|A,B", help="3 means seeds 0,1,2; 4,7 means these two; 4, means this one")
    what.add_argument(
        "--grid", action="append", metavar="M.P=A,B", help="vary a parameter: debora.tau=4,8,16; may be repeated"
    )
    what.add_argument("--model", metavar="PATH|ID", help="model folder or Hub id, for the tasks that take one")
    what.add_argument("--limit", metavar="N", help="most training rows, and most rows of each evaluation split")
    what.add_argument("--evaluation-limit", metavar="N", help="most rows of each evaluation split, instead of --limit")
    what.add_argument("--threads", "--cpus-per-run", metavar="N", help="CPUs of each run, a thread on each (default 1)")
    what.add_argument(
        "--tune", metavar="K", help="search each method's hyperparameters on each task with K trials, on the holdout"
    )
    what.add_argument("--preset", metavar="NAME", help="a comparison that comes with the program: see list")
    what.add_argument(
        "--config", type=_path, metavar="FILE", help="a comparison in TOML; options given here win over it"
    )
    _add_fields(run.add_argument_group("training, the same for every method ([train] in TOML)"), TrainSpec)
    place = run.add_argument_group("where and how (no part of a run's identity)")
    _add_fields(place, Place, leave_out=("model", "path"))
    _add_fields(place, Execution)
    _add_results(place)
    _add_tracking(place)
    place.add_argument(
        "--dry-run", action="store_true", help="show the cells with their parameter counts and the time they take"
    )
    place.add_argument("--retry-failed", action="store_true", help="run failed and out-of-memory cells again")


def _add_fields(parser: Any, model: type[Strict], leave_out: Sequence[str] = ()) -> None:
    """One option per field: the name with dashes, the help from its description."""
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        flag = f"--{name.replace('_', '-')}"
        default = "" if field.default in (None, False, ()) else f" (default {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, dest=name, action="store_const", const=True, help=text)
        else:
            parser.add_argument(flag, dest=name, metavar="VALUE", help=text)


def _add_results(parser: Any) -> None:
    parser.add_argument(
        "--results", type=_path, default=Path("results"), metavar="DIR", help="results folder (default results)"
    )


def _add_selection(parser: Any) -> None:
    _add_results(parser)
    parser.add_argument("--methods", type=_names, help="only these methods")
    parser.add_argument("--tasks", type=_names, help="only these tasks")


def _add_tracking(parser: Any) -> None:
    parser.add_argument(
        "--tracking-uri",
        type=_uri,
        metavar="URI",
        default=os.environ.get("HARNESS_TRACKING_URI") or None,
        help="MLflow server or database, or off (default: mlflow.db in the results folder)",
    )


def _names(text: str) -> list[str]:
    from harness.notation import split_tasks

    try:
        return split_tasks(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _path(text: str) -> Path:
    try:
        return Path(checked_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _uri(text: str) -> str:
    known = text == "off" or re.match("databricks|[a-z][a-z0-9+.-]*:.", text, re.IGNORECASE)
    if not known or plain(text) != text or len(text) > LONGEST_URI:
        raise argparse.ArgumentTypeError(f"'{text}' is not allowed: give off, http://HOST:PORT or sqlite:///FILE")
    return text


def _calls(name: str, *fields: str) -> Callable[[argparse.Namespace], int]:
    """The command of harness/commands/NAME.py with these options; imported when it is called."""

    def call(options: argparse.Namespace) -> int:
        module = importlib.import_module(f"harness.commands.{name}")
        return int(module.command(*(getattr(options, field) for field in fields)))

    return call


def _run(options: argparse.Namespace) -> int:
    from harness.commands import run

    return run.command(options)


def _glue(options: argparse.Namespace) -> int:
    from harness.commands import submission

    return submission.command("glue", options.runs, options.results, options.to)


def _report(options: argparse.Namespace) -> int:
    from harness.commands import report

    wanted = report.Wanted(
        options.sort,
        options.against,
        options.to_mlflow,
        options.tracking_uri,
        every_split=options.every_split,
        selection=report_options.selection_of(options),
        is_complete=options.config is None,
        latex_style=options.latex_style,
        rank_agreement=options.rank_agreement,
    )
    return report.command(options.results, options.methods, options.tasks, wanted)


def _diff(options: argparse.Namespace) -> int:
    from harness.commands import diff

    return diff.command(options.results, *options.runs)
