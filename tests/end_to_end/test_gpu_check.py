"""scripts/gpu_check.sh on the CPU, at its smallest."""

import importlib.metadata
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness import registry
from scripts import gpu_check, gpu_check_parts
from scripts.gpu_check import Cost, Job, Row, Sizes

ROOT = Path(__file__).parents[2]
SMALLEST = Sizes(blocks=1, width=16, tokens=8, batch_size=2, repeats=1)


@pytest.fixture
def in_this_process(monkeypatch):
    """The checks are not started as processes of their own, which costs seconds each."""
    monkeypatch.setattr(gpu_check, "lines_of", gpu_check_parts.lines_of)
    monkeypatch.setattr(gpu_check, "SIZES", {"cpu": SMALLEST})
    monkeypatch.setattr(gpu_check, "make_importable", lambda folder: None)


def table_rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_part_is_a_line_and_is_written(in_this_process, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "RESUMED", ("debora[rank=2,T_max=2]",))
    parts = "contracts,resume,memory,steps"
    command = ["--device", "cpu", "--only", parts, "--methods", "head", "--output", str(tmp_path / "t.md")]
    assert gpu_check.main(command) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "t.md").read_text() == text.rstrip("\n") + "\n"
    rows = [row[:4] for row in table_rows(text) if row[0] in gpu_check.PARTS]
    assert rows == [
        ["contracts", "`head`", "fp32", "passed"],
        ["contracts", "`head`", "bf16", "passed"],
        ["resume", "`debora[rank=2,T_max=2]`", "fp32", "passed"],
        ["resume", "`debora[rank=2,T_max=2]`", "bf16", "passed"],
        ["memory", "`64 MiB`", "", "passed"],
        ["memory", "`a run`", "fp32", "skipped"],
    ]
    costs = [row for row in table_rows(text) if row[0] in ("floor", *gpu_check_parts.METHODS)]
    assert [row[1] for row in costs] == ["fp32"] * 5 + ["bf16"] * 5
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in costs)


def test_a_third_of_the_components_is_left():
    (name,) = (name for name in gpu_check_parts.METHODS if "third" in name)
    update = gpu_check_parts.side(name, "fp32", "cpu", SMALLEST._replace(blocks=2))
    assert list(update.__self__.adaptation.ranks().values()) == [2, 3, 3] * 4


def test_a_check_that_fails_is_a_line_and_stops_no_other(in_this_process, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "RESUMED", ("no_such_method", "lora[rank=2]"))
    assert gpu_check.main(["--device", "cpu", "--only", "resume"]) == 1
    rows = [row for row in table_rows(capsys.readouterr().out) if row[0] == "resume"]
    assert [row[3] for row in rows] == ["failed", "failed", "passed", "passed"]
    assert rows[0][4]


def test_a_run_that_goes_on_otherwise_fails(monkeypatch):
    begin = gpu_check_parts.begin

    def begin_elsewhere(*given):
        training = begin(*given)
        training.data.seed = len(started)
        started.append(training)
        return training

    started = []
    monkeypatch.setattr(gpu_check_parts, "begin", begin_elsewhere)
    (line,) = gpu_check_parts.lines_of(Job("resume", "lora[rank=2]", "fp32"), "cpu", SMALLEST)
    assert line.result == "failed"
    assert line.detail.startswith("losses differ from update")


def test_a_check_whose_process_dies_is_a_line():
    (line,) = gpu_check.lines_of(Job("no such part"), "cpu", SMALLEST)
    assert (line.result, line.part) == ("failed", "no such part")
    assert "KeyError" in line.detail


def test_packed_is_skipped_where_the_library_is_missing(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "ON_PACKED", ("lora",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu_check.main(["--device", "cpu", "--only", "packed"]) == 0
    rows = [row for row in table_rows(capsys.readouterr().out) if row[0] == "packed"]
    assert [row[2:] for row in rows] == [
        ["int8", "skipped", "bitsandbytes is not installed"],
        ["nf4", "skipped", "bitsandbytes is not installed"],
    ]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install '.[quantised]'")
def test_packed_ones_keep_the_contracts(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "ON_PACKED", ("lora",))
    assert gpu_check.main(["--device", "cpu", "--only", "packed"]) == 0
    rows = [row for row in table_rows(capsys.readouterr().out) if row[0] == "packed"]
    assert [row[2:4] for row in rows] == [["int8", "passed"], ["nf4", "passed"]]


def test_ray_is_skipped_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu_check_parts.lines_of(Job("ray"), "cpu", SMALLEST) == [
        Row("ray", "two runs", "fp32", "skipped", "ray is not installed")
    ]


def test_without_an_installation_the_checkout_says_what_there_is(tmp_path):
    gpu_check.write_entry_points(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (found.metadata["Name"], found.version) == (project["name"], project["version"])
    names = {entry.name: entry.value for entry in found.entry_points if entry.group == registry.METHODS}
    assert names == project["entry-points"][registry.METHODS]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--device", "cpu", "--only", "contract"],
            "'contract' is not one of contracts, packed, resume, ray, memory, steps",
        ),
        (["--device", "cpu", "--methods", "lore"], "'lore' is not one of"),
    ],
)
def test_wrong_words_are_told(in_this_process, options, message, capsys):
    with pytest.raises(SystemExit) as told:
        gpu_check.main(options)
    assert told.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_peaks_are_in_mebibytes():
    lines = [Cost("floor", "bf16", 0.0123, 1.0, 1e5, 3 * 2**30)]
    assert "| floor | bf16 | 12.3 | 1.00 | 100,000 | 3,072 |" in gpu_check.tables(lines, "cpu", SMALLEST, 1.0)
