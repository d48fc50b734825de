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
KEPT = [json.loads(line) for line in (Path(__file__).parent / "fuzz" / "commands.jsonl").read_text().splitlines()]
TAKES_RESULTS = {"run", "status", "report", "compare", "diff", "export", "export-glue"}
LONG = "x" * 100_000
STEERING = ["\x1b[31mred", "a\rb", "a\nb", "a\x00b", "\x07", "\u202etxt", "\u2028", "\udcff", "\x9b31m"]
DEEP = ["[" * 5000, "]" * 5000, "[" * 5000 + "]" * 5000, "{" * 5000, "{a=" * 5000 + "1" + "}" * 5000]
DEEP += ["{" + "a." * 5000 + "a=1}"]
NO_NUMBER = ["", " ", "-1", "nan", "-inf", "1e400", "9" * 10_000, "0x" + "f" * 10_000, "1" + "0" * 30, "abc", "true"]
NO_NUMBER += ["٣", "1,,x", "1\n2", "'1'", "1979-05-27", "{}", LONG, *DEEP, *STEERING]
AT_LEAST_ONE = ["batches", "epochs", "batch-size", "micro-batches", "limit", "threads", "tune", "seeds", "rank-curve"]
NUMBERS = [*AT_LEAST_ONE, "warmup", "clip-norm", "holdout-points", "checkpoint-every", "max-retries"]
OF_RAY = ["run-timeout", "gpus-per-run"]
WORDS = ["methods", "tasks", "model", "grid", "device", "precision", "schedule", "executor", "preset", "config"]
WORDS += ["data-root", "results", "tracking-uri"]
NO_WORD = ["", " ", "nowhere/at/all", "~nobody-of-that-name/x", LONG, "y/" * 20_000, *DEEP, *STEERING]
HUGE = ["999999999999", "1" + "0" * 18]
METHODS = """
lora[init=pissa_niter_0] lora[init=pissa_niter_-1] lora[init=pissa_niter_x] lora[init=pissa_niter_] lora[init=]
lora[init=pissa_niter_99999999999] lora[init=pissa_niter_٣] lora[init=4] lora[init=pissa_niter_1001] lora[rank=-1]
lora[rank=1e3] lora[rank=1.5] lora[rank_pattern=3] lora[rank_pattern={query=0.5}] lora[target_modules=3]
lora[target_modules=[]] lora[target_modules=[1]] lora[target_modules=[""]] lora[dropout=2] lora[alpha=0] lora[alpha=nan]
lora[learning_rate=inf] lora[weight_decay=-1] lora[parameters=0] lora[ranks=7] lora[shuffle_ranks=true] lora[rslora=1]
lora[init=orthogonal,rank=3] peft peft[type=] peft[type=3] peft[type=lora,r=0] peft[type=lora,r=-1] peft[type=lora,r=1.5]
peft[type=lora,r=1000000000000] peft[type=lora,lora_alpha=0] peft[type=lora,lora_alpha=-1] peft[type=lora,lora_dropout=2]
peft[type=lora,lora_dropout=1] peft[type=lora,lora_dropout=-0.1] peft[type=lora,target_modules=3] peft[type=lora,r="4"]
peft[type=lora,r=60000000] peft[type=vera,r=0] peft[type=oft,r=-1] peft[type=boft,boft_dropout=2] peft[type=loha,r=0]
peft[type=lokr,r=0] peft[type=hra,r=0] peft[type=miss,r=0] peft[type=miss,mini_r=0] peft[type=randlora,r=0]
peft[type=prompt_tuning,num_virtual_tokens=0] peft[type=prefix_tuning,num_virtual_tokens=-1] peft[type=vblora,topk=0]
peft[type=fourierft,n_frequency=0] peft[type=adamss,num_subspaces=0] peft[type=vera,projection_prng_key=-1]
""".split()
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
