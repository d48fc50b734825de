"""A third-party package is found through its entry point and kept to the contracts; the README shows its code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugin"

TRY_IT = """
import pathlib, sys
from harness.contracts import METHOD_CONTRACTS, Subject
for contract in METHOD_CONTRACTS:
    folder = pathlib.Path(sys.argv[1]) / contract.__name__
    folder.mkdir()
    contract(Subject("norm_tuning", folder))
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
    assert "norm_tuning  The backbone's LayerNorms alone." in listing
    assert "bias: train the norms' biases too" in run(environment, "-m", "harness", "list", "norm_tuning").stdout


def test_keeps_the_contracts(environment, tmp_path):
    done = run(environment, "-c", TRY_IT, str(tmp_path))
    assert done.stdout.strip().endswith("kept"), done.stderr


def test_runs_beside_the_others_and_reports_what_it_does_not_support(environment, tmp_path):
    what = ["--methods", "head,norm_tuning", "--tasks", "synthetic,digits", "--batches", "4"]
    where = ["--executor", "serial", "--results", str(tmp_path)]
    done = run(environment, "-m", "harness", "run", *what, *where)
    assert done.returncode == 0, done.stderr
    assert "norm_tuning · digits · seed 0" in done.stdout
    assert "unsupported: the backbone has no LayerNorm" in done.stdout


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


def test_the_readme_shows_this_very_code():
    readme = (ROOT / "README.md").read_text()
    for name in ("norm_tuning.py", "pyproject.toml"):
        assert (PLUGIN / name).read_text().strip() in readme, f"README.md does not show tests/plugin/{name} as it is"
