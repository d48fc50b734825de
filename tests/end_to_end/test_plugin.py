"""A third-party package is found through its entry point and kept to the contracts; the README shows its code."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "plugin"

TRY_IT = """
import pathlib, sys
from harness.contracts import METHOD_CONTRACTS, Subject
for contract in METHOD_CONTRACTS:
    folder = pathlib.Path(sys.argv[1]) / contract.__name__
    folder.mkdir()
    contract(Subject(sys.argv[2], folder))
print(len(METHOD_CONTRACTS), "kept")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment in which the plugin is installed, beside this one."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(PLUGIN)], check=True, capture_output=True)
    return beside(site)


def beside(site):
    """This environment with the packages of `site` before its own."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run(environment, *arguments, **options):
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, **options)


def test_listed_and_described(environment):
    listing = run(environment, "-m", "harness", "list").stdout
    assert "norm_tuning  The backbone's LayerNorms alone. Provenance: not stated." in listing
    searched, other = listing.index("methods, ranks searched:"), listing.index("methods, other:")
    assert searched < listing.index("\n  growing ") < other < listing.index("\n  norm_tuning ")
    assert "Provenance: ours: an example." in listing
    assert "bias: train the norms' biases too" in run(environment, "-m", "harness", "list", "norm_tuning").stdout


@pytest.mark.parametrize("method", ["norm_tuning", "growing"])
def test_keeps_the_contracts(method, environment, tmp_path):
    done = run(environment, "-c", TRY_IT, str(tmp_path), method)
    assert done.stdout.strip().endswith("kept"), done.stderr


def test_runs_beside_the_others_and_reports_what_it_does_not_support(environment, tmp_path):
    what = ["--methods", "head,norm_tuning", "--tasks", "synthetic,digits", "--batches", "4"]
    where = ["--executor", "serial", "--results", str(tmp_path)]
    done = run(environment, "-m", "harness", "run", *what, *where)
    assert done.returncode == 0, done.stderr
    assert "norm_tuning · digits · seed 0" in done.stdout
    assert "unsupported: the backbone has no LayerNorm" in done.stdout


def test_a_column_of_a_package_is_in_every_table(environment, tmp_path):
    where = ["--results", str(tmp_path)]
    what = ["--methods", "head,full", "--tasks", "synthetic", "--seeds", "1", "--batches", "4", "--executor", "serial"]
    assert run(environment, "-m", "harness", "run", *what, *where).returncode == 0
    done = run(environment, "-m", "harness", "report", "--sort", "watt_hours", *where)
    assert (done.returncode, done.stderr) == (0, "")
    tables = tmp_path / "tables"
    assert "watt hours" in done.stdout
    assert "| watt hours |" in re.sub(" +", " ", (tables / "leaderboard.md").read_text())
    assert "& Watt hours \\\\" in (tables / "leaderboard.tex").read_text()
    assert "watt hours</button>" in (tmp_path / "report.html").read_text()
    for form in ("leaderboard.md", "leaderboard.tex"):
        assert "watt hours (of training, at 65 W)" in (tables / form).read_text()
    rows = list(csv.DictReader((tables / "leaderboard.csv").read_text().splitlines()))
    energy = {row["label"]: float(row["watt_hours"]) for row in rows}
    seconds = {row["label"]: float(row["seconds_training"]) for row in rows}
    assert energy == pytest.approx({label: value * 65 / 3600 for label, value in seconds.items()})
    (setting,) = json.loads((tables / "leaderboard.json").read_text())["settings"]
    assert {row["label"]: row["watt_hours"] for row in setting["rows"]} == pytest.approx(energy)
    printed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("head", "full"))]
    assert printed[:2] == sorted(energy, key=energy.__getitem__)


def test_one_that_grows_and_is_pruned_is_reported_with_its_peak(environment, tmp_path):
    """One rank in all layers is 448 parameters; the record, whose last size is smaller, and the table have the peak."""
    what = ["--methods", "growing[rank=2,every=2,keep=0.25]", "--tasks", "synthetic", "--batches", "12"]
    where = ["--executor", "serial", "--results", str(tmp_path)]
    done = run(environment, "-m", "harness", "run", *what, *where)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "runs").glob("*/record.json")
    sizes = [parameters for _, parameters, _ in json.loads(file.read_text())["trajectory"]]
    assert sizes[:3] == [0, 448, 896]
    assert 0 < sizes[3] < 448
    with (tmp_path / "tables" / "leaderboard.csv").open() as table:
        (row,) = csv.DictReader(table)
    found = [float(row[f"parameters_{when}"]) for when in ("initial", "peak", "final")]
    assert found == [0, 896, sizes[3]]


@pytest.fixture(scope="module")
def reported(environment, tmp_path_factory):
    """A results folder with two methods on the plugin's task, and what `run`, `report` and `compare` said of it."""
    results = tmp_path_factory.mktemp("results")
    where = ["--results", str(results)]
    what = ["--methods", "full[learning_rate=0.01],head[learning_rate=1e-9]", "--tasks", "halfspace", "--seeds", "5"]
    what += ["--batches", "60"]
    said = [run(environment, "-m", "harness", "run", *what, "--executor", "serial", *where)]
    said += [run(environment, "-m", "harness", "report", *where)]
    said += [run(environment, "-m", "harness", "compare", "full", "head", *where)]
    assert [done.returncode for done in said] == [0, 0, 0], [done.stderr for done in said]
    return results, [done.stdout for done in said]


def test_a_picture_of_a_package_is_made_and_on_the_page(reported):
    results, _ = reported
    for form in ("png", "pdf"):
        assert (results / "pictures" / f"score_vs_seconds.{form}").stat().st_size > 1000
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "Score against the seconds of training" in page


def test_a_metric_of_a_package_has_its_sense_and_its_paired_test(reported):
    """From the one declaration: no file of the harness knows the metric."""
    results, (_, leaderboard, compared) = reported
    rows = [line.split()[0] for line in leaderboard.splitlines() if line.startswith(("full", "head"))]
    assert rows[0].startswith("full"), "the one with fewer errors is first"
    assert "seeds and 120 examples" in compared
    assert "is better than head" in compared
    assert "McNemar" in compared
    assert "error_rate, lower is better" in (results / "tables" / "leaderboard.md").read_text()


def test_a_plugin_that_does_not_import_is_named_and_harms_nothing(tmp_path):
    package = tmp_path / "broken-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[harness.methods]\nbroken = not_there:Method\n")
    environment = beside(tmp_path)
    listing = run(environment, "-m", "harness", "list")
    assert listing.returncode == 0
    assert "method 'broken' of package broken cannot be imported" in listing.stdout
    done = run(environment, "-m", "harness", "run", "--methods", "broken", "--tasks", "digits")
    assert done.returncode == 2
    assert "No module named 'not_there'" in done.stderr


BROKEN = """
import sys
from typing import Any
from harness.method import Method

class Fine(Method):
    \"\"\"Fine.\"\"\"
    learning_rate: float = 1e-3
    def start(self, backbone, train, data, rng): ...

class BlankDocstring(Fine):
    "  "

class NumberAsDocstring(Fine): ...
NumberAsDocstring.__doc__ = 5

class Capabilities(Fine):
    capabilities = (1, None)

class Default(Fine):
    value: Any = object()

class Details(Fine):
    @classmethod
    def details(cls): raise RuntimeError("two\\nlines")

class Traces(Fine):
    traces = ("rank",)

class Provenance(Fine):
    provenance = "somewhere"

class Group(Fine):
    group = "best"

class Unfinished(Method):
    learning_rate: float = 1e-3

number = 5
"""
UNUSABLE = {  # of BROKEN, and why
    "broken:Capabilities": "TypeError: sequence item 0: expected str instance, int found",
    "broken:Default": "PydanticSerializationError: Unable to serialize unknown type",
    "broken:Traces": "TypeError: Traces.traces is ('rank',), which are no harness.trace.Trace",
    "broken:Provenance": "TypeError: Provenance.provenance is 'somewhere'; allowed are ",
    "broken:Group": "TypeError: Group.group is 'best'; known are fixed rank, ranks searched, ",
    "broken:Unfinished": "Unfinished does not define start",
    "broken:Absent": "has no attribute 'Absent'",
    "broken:number": "which is not a subclass of harness.method.Method",
    "exits:Method": "of package broken cannot be imported: SystemExit: go now",
    "raises:Method": "of package broken cannot be imported: Odd: it is",
    "!": "of package broken cannot be imported: AttributeError",
}


def installed(site, **names):
    """A package `broken` in the folder that registers these methods, and the environment with it."""
    package = site / "broken-1.0.dist-info"
    package.mkdir(exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in names.items()]
    (package / "entry_points.txt").write_text("\n".join(["[harness.methods]", *lines, ""]))
    (site / "broken.py").write_text(BROKEN)
    (site / "exits.py").write_text("import sys\nsys.exit('go\\nnow')\n")
    (site / "raises.py").write_text("class Odd(BaseException): ...\nraise Odd('it is')\n")
    return beside(site)


def test_plugins_that_are_broken_in_any_way_are_named_and_end_no_list(tmp_path):
    names = {f"plugin{n}": value for n, value in enumerate(UNUSABLE)}
    others = {"blank": "broken:BlankDocstring", "numbered": "broken:NumberAsDocstring", "detailed": "broken:Details"}
    environment = installed(tmp_path, **names, **others, lora="broken:Fine")
    listing = run(environment, "-m", "harness", "list")
    assert listing.returncode == 0, listing.stderr
    lines = {line.split()[0]: line for line in listing.stdout.splitlines() if line.startswith("  ")}
    for name, value in names.items():
        assert "(unavailable: " in lines[name]
        assert UNUSABLE[value] in lines[name]
    assert "(no description)" in lines["blank"]
    assert "cannot be described: AttributeError" in lines["numbered"]
    assert "claimed twice, by broken:Fine and methods.lora:Lora" in lines["lora"]
    assert "Full fine-tuning" in lines["full"]
    assert "synthetic" in lines


@pytest.mark.parametrize("value", ["exits:Method", "broken:Default", "broken:Unfinished"])
def test_a_run_of_a_broken_plugin_is_one_line(value, tmp_path):
    options = ["run", "--methods", "broken", "--tasks", "synthetic", "--results", str(tmp_path / "results")]
    done = run(installed(tmp_path, broken=value), "-m", "harness", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert UNUSABLE[value] in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("value", ["broken:NumberAsDocstring", "broken:Details"])
def test_a_plugin_that_cannot_be_described_is_one_line(value, tmp_path):
    done = run(installed(tmp_path, broken=value), "-m", "harness", "list", "broken")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "method 'broken' of package broken cannot be described: " in done.stderr


NO_METRIC = """
from harness.task import Task

class Scoreless(Task):
    def load(self, data_root): ...
    def backbone(self, model, *, meta=False, trust_remote_code=False): ...
    def collate(self, encoded, rows, generator): ...
    def loss(self, model, batch, generator): ...
    def predict(self, model, batch): ...
"""


def test_a_task_without_a_metric_is_one_line(tmp_path):
    environment = installed(tmp_path)
    (tmp_path / "scoreless.py").write_text(NO_METRIC)
    (tmp_path / "broken-1.0.dist-info" / "entry_points.txt").write_text("[harness.tasks]\nodd = scoreless:Scoreless\n")
    done = run(environment, "-m", "harness", "run", "--methods", "head", "--tasks", "odd", "--dry-run")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "TypeError: Scoreless declares no metric: it needs `measures` or its own `headline`" in done.stderr


def test_a_name_that_is_claimed_twice_is_told_and_leaves_the_others(tmp_path):
    environment = installed(tmp_path, lora="broken:Fine")
    done = run(environment, "-m", "harness", "run", "--methods", "lora", "--tasks", "synthetic", "--dry-run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the name 'lora' in harness.methods is claimed twice" in done.stderr
    assert run(environment, "-m", "harness", "list", "head").returncode == 0


@pytest.mark.parametrize(("page", "name"), [("README.md", "norm_tuning.py"), ("docs/extending.md", "growing.py")])
def test_the_docs_show_this_very_code(page, name):
    assert (PLUGIN / name).read_text().strip() in (ROOT / page).read_text(), f"{page} does not show {name} as it is"


def test_the_readme_shows_lines_of_this_very_package():
    readme = (ROOT / "README.md").read_text()
    shown = readme.partition("```toml\n[build-system]")[2].partition("```")[0]
    there = (PLUGIN / "pyproject.toml").read_text().splitlines()
    assert len(shown.splitlines()) > 10
    assert [line for line in shown.splitlines() if line not in there] == [], "more is added there, and nothing else"
