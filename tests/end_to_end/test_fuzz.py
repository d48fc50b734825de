"""Bad input of every kind: exit code 2, one line that names it, and nothing written."""

import itertools
import json
import os
import re
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import plain

LONGEST = 2000
FUZZ = Path(__file__).parent / "fuzz"
KEPT = [json.loads(line) for line in (FUZZ / "commands.jsonl").read_text().splitlines()]
TAKES_RESULTS = {"run", "status", "report", "compare", "diff", "export", "export-glue"}
LONG = "x" * 100_000
STEERING = ["\x1b[31mred", "a\rb", "a\nb", "a\x00b", "\x07", "\u202etxt", "\u2028", "\udcff", "\x9b31m"]
DEEP = ["[" * 5000, "]" * 5000, "[" * 5000 + "]" * 5000, "{" * 5000, "{a=" * 5000 + "1" + "}" * 5000]
DEEP += ["{" + "a." * 5000 + "a=1}"]
NO_NUMBER = ["", " ", "-1", "nan", "-inf", "1e400", "9" * 10_000, "0x" + "f" * 10_000, "1" + "0" * 30, "abc", "true"]
NO_NUMBER += ["٣", "1,,x", "1\n2", "'1'", "1979-05-27", "{}", LONG, *DEEP, *STEERING]
AT_LEAST_ONE = [
    "batches",
    "epochs",
    "batch-size",
    "micro-batches",
    "limit",
    "evaluation-limit",
    "evaluation-batch-size",
    "threads",
    "tune",
    "seeds",
    "rank-curve",
]
NUMBERS = [*AT_LEAST_ONE, "warmup", "clip-norm", "holdout-points", "checkpoint-every", "max-retries"]
OF_RAY = ["run-timeout", "gpus-per-run"]
WORDS = ["methods", "tasks", "model", "grid", "device", "precision", "schedule", "executor", "preset", "config"]
WORDS += ["data-root", "results", "tracking-uri"]
NO_WORD = ["", " ", "nowhere/at/all", "~nobody-of-that-name/x", LONG, "y/" * 20_000, *DEEP, *STEERING]
HUGE = ["999999999999", "1" + "0" * 18]
METHODS = (FUZZ / "methods.txt").read_text().splitlines()
RUN = {"methods": "head", "tasks": "synthetic", "batches": "2", "executor": "serial"}
WRONG = [(option, value) for option in NUMBERS for value in NO_NUMBER]
WRONG += [(option, value) for option in AT_LEAST_ONE for value in ("0", *HUGE)]
WRONG += [(option, value) for option in ("checkpoint-every", "max-retries", "holdout-points") for value in HUGE]
WRONG += [(option, value) for option in WORDS for value in NO_WORD if value or option != "methods"]
WRONG += [("methods", method) for method in METHODS]
WRONG += [("methods", f"lora[rank={value}]") for value in (*NO_NUMBER, *HUGE) if "{}" not in value]
WRONG += [("methods", f"lora[{value}=1]") for value in NO_WORD]
WRONG += [("grid", f"head.learning_rate={value}") for value in NO_NUMBER if value not in ("9" * 10_000,)]
WRONG += [("grid", f"{value}=1") for value in NO_WORD]
WRONG += [("tasks", f"{family}:{value}") for family in ("text", "image") for value in NO_WORD]
WRONG += [("tasks", f"synthetic[num_rows={value}]") for value in ("0", "-1", "1e5", LONG, "[" * 500 + "]" * 500)]
WRONG += [("seeds", value) for value in ("1,1", "0,9223372036854775808", "0," + "9" * 5000, ",", "-1,2", "1;2", "0x10")]
WRONG += [
    ("device", value) for value in ("cpu:7", "cpu:256", "cpu:-1", "cuda:99", "cuda:256", "cuda:-1", "meta", "mps:3")
]
WRONG += [("rank-curve", value) for value in (",", "4,0", "2,nan", ",".join(["1"] * 5000))]
WRONG += [("results", value) for value in ("/dev/null", "/dev/null/below", __file__, f"{__file__}/below/it")]
OF_RAY = [("run-timeout", value) for value in ("0", *NO_NUMBER, *HUGE)]
OF_RAY += [("gpus-per-run", value) for value in (*NO_NUMBER, "2", "1e-400x")]
OF_RAY += [
    ("address", value) for value in (*NO_WORD, ":6379", "127.0.0.1", "127.0.0.1:", "127.0.0.1:1", "127.0.0.1:99999")
]
OF_RAY += [
    ("address", value) for value in ("127.0.0.1:-1", "127.0.0.1:²", "ray://127.0.0.1:1", "a..b:6379", f"{LONG}:6379")
]
OF_RAY += [("threads", "100000")]
WRONG.remove(("results", "nowhere/at/all"))


def stopped(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def no_cluster(**options: object) -> None:
    """What Ray says to "auto" on a machine without a cluster; another test may have one running."""
    raise ConnectionError("Could not find any running Ray instance")


def told(capsys, *names: str) -> str:
    """The one line on stderr, which holds one of the names or how it begins."""
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    line = output.err.removesuffix("\n")
    assert plain(line) == line
    assert len(line) <= LONGEST
    pieces = [piece for name in names for piece in (name, name.partition("=")[2] or "''")]
    words = [word for piece in pieces for word in (plain(piece)[:20], *re.findall(r"\w+", piece))]
    assert any(word in line for word in words), line
    return line


@pytest.mark.parametrize("arguments", KEPT, ids=itertools.count())
def test_a_bad_command_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", no_cluster)
    extra = ["--results", "out"] if arguments[0] in TAKES_RESULTS else []
    extra += ["--to", "exported"] if arguments[0] == "export" else []
    assert stopped([*arguments, *extra]) == 2
    told(capsys, *arguments, "--results")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "executor"),
    [(*pair, "serial") for pair in WRONG] + [(*pair, "ray") for pair in OF_RAY],
    ids=(f"{option}-{number}" for number, (option, _) in enumerate(WRONG + OF_RAY)),
)
def test_a_wrong_value_of_any_option_is_one_line_and_writes_nothing(
    tmp_path, capsys, monkeypatch, option, value, executor
):
    monkeypatch.chdir(tmp_path)
    given = RUN | {"executor": executor, "results": "out"} | {option: value}
    given.pop("batches" if option == "epochs" else "", None)
    arguments = ["run", *(f"--{name}={text}" for name, text in given.items())]
    assert stopped(arguments) == 2
    told(capsys, f"--{option}", option.replace("-", "_"), value.strip() or "''")
    assert list(tmp_path.iterdir()) == []


SWEEPS = {
    "seeds": ["1000000000", "-5", "0", "0x" + "f" * 5000, "1.5", "nan", "[]", "[9223372036854775808]", '"3"', "[0, 0]"],
    "methods": ['"lora"', "[3]", '["lora[rank=0]"]', "[" * 5000 + "]" * 5000, '["a\\u001b[31m"]', f'["{LONG}"]', "{}"],
    "tasks": [
        '["text:a\\u0000b"]',
        '["text:"]',
        '["text:a\\u202eb"]',
        '["text:~nobody-of-that-name"]',
        f'["text:{LONG}"]',
    ],
    "model": ['""', '" "', "3", f'"{LONG}"', '"a\\u0000b"', '"\\u202e"'],
    "limit": ["0", "1e400", "9" * 10_000, "1" + "0" * 30, "true", "1979-05-27"],
    "threads": ["0", "1" + "0" * 30, "[1]"],
    "tune": ["0", "100000000", "nan"],
    "grid": ["3", '{"lora.rank" = 3}', '{"lora.rank" = []}', '{"lora.rank" = [[[1]]]}', '{"head" = [1]}', '{"" = [1]}'],
    "train": ["3", "{batches = 0}", "{batches = 1000000000000}", "{epochs = inf}", "{batch_size = 1e3}", "{x = 1}"],
    "description": ["3", "9" * 10_000, "{" + "a." * 5000 + "a = 1}"],
    "nothing_of_ours": ["1"],
}
WHOLE = [
    "[" + "a." * 5000 + "a]",
    "a = " * 100,
    "[[[",
    '"',
    "\x00",
    "[train]\n[train]\n",
    "a.b = 1\na.b = 2",
    LONG,
    "seeds",
]


@pytest.mark.parametrize(
    "text",
    [f"{key} = {value}\n" for key, values in SWEEPS.items() for value in values] + WHOLE,
    ids=itertools.count(),
)
def test_a_wrong_sweep_file_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sweep.toml"
    given = {"methods": '["lora"]', "tasks": '["synthetic"]'}
    others = "".join(f"{key} = {value}\n" for key, value in given.items() if not text.startswith(f"{key} ="))
    path.write_text(others + text)
    for command in (["validate", str(path)], ["run", "--config", str(path), "--results", "out"]):
        assert stopped(command) == 2
        told(capsys, "sweep.toml")
    assert list(tmp_path.iterdir()) == [path]


def test_a_product_of_seeds_and_grid_that_is_too_large_is_named(tmp_path, capsys):
    alphas = ",".join(map(str, range(1, 102)))
    given = ["--methods", "lora", "--tasks", "synthetic", "--results", str(tmp_path / "out")]
    assert stopped(["run", *given, "--seeds", "10000", "--grid", f"lora.alpha={alphas}"]) == 2
    assert "1,010,000 runs (101 methods x 1 tasks x 10,000 seeds)" in told(capsys, "runs")
    dropouts = ",".join(f"{number / 1000}" for number in range(200))
    grids = [f"lora.{name}={values}" for name, values in {"alpha": alphas, "dropout": dropouts, "rank": alphas}.items()]
    assert stopped(["run", *given, *(part for grid in grids for part in ("--grid", grid))]) == 2
    assert f"{101 * 200 * 101:,} methods" in told(capsys, "methods")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["validate"], ["run", "--results", "out", "--config"]], ids=["validate", "run"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "endless", "large", "binary", "latin", "gone"])
@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_of_another_kind_is_one_line(tmp_path, capsys, monkeypatch, command, kind, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"it.{suffix}"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        with path.open("wb") as stream:
            stream.truncate(2_000_000_000)
    elif kind != "gone":
        path.write_bytes(os.urandom(64) + b"\xff\xfe" if kind == "binary" else "a = 'é'".encode("latin-1"))
    assert stopped([*command, str(path)]) == 2
    told(capsys, path.name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 10_000, "null", '{"spec": 3}']
)
def test_a_wrong_record_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    assert stopped(["validate", str(path)]) == 2
    told(capsys, "record.json")


OTHERS = {
    "list": ["{}"],
    "validate": ["{}"],
    "diff": ["{}", "{}"],
    "compare": ["{}", "{}"],
    "export": ["{}", "--to", "exported"],
    "export-glue": ["{}"],
    "status": ["--results={}"],
    "report": ["--methods={}"],
    "": ["{}"],
}


@pytest.mark.parametrize("word", NO_WORD, ids=itertools.count())
@pytest.mark.parametrize("command", OTHERS)
def test_a_wrong_word_of_another_command_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch, command, word):
    monkeypatch.chdir(tmp_path)
    rest = [part.replace("{}", word) for part in OTHERS[command]]
    assert stopped([command, *rest] if command else rest) == 2
    told(capsys, word, "--results", "COMMAND")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", NO_WORD, ids=itertools.count())
def test_a_word_too_many_is_one_line(capsys, word):
    assert stopped(["list", "lora", word]) == 2
    told(capsys, word)
