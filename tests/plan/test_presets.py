"""The presets: in order, with a source for every value, and true to the tables that they stand for."""

import math
import tomllib

import pytest

from harness.cli import main
from harness.plan import sweep_file
from harness.plan.sweep import Sweep, method_cells, task_cells

PRESETS = sweep_file.presets()
OF_A_PAPER = [name for name in PRESETS if name.startswith(("paper-", "adalora-official/"))]
OFFICIAL = {  # rows of the training split, then the source's: updates of warm-up, epochs, tokens
    "cola": (8551, 100, 25, 64),
    "mnli": (392_702, 1000, 7, 256),
    "mrpc": (3668, None, 30, 320),
    "qnli": (104_743, 500, 5, 512),
    "qqp": (363_846, 2000, 5, 320),
    "rte": (2490, 200, 50, 320),
    "sst2": (67_349, 1000, 24, 128),
    "stsb": (5749, 100, 25, 128),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_in_order(name, capsys):
    assert main(["validate", str(PRESETS[name])]) == 0
    assert "in order" in capsys.readouterr().out


def test_presets_are_found_by_name(capsys):
    assert main(["list", "adalora-official/cola"]) == 0
    assert '"adalora.tinit" = [800]' in capsys.readouterr().out
    assert main(["run", "--preset", "adalora-official/mrcp"]) == 2
    assert "Did you mean 'adalora-official/mrpc'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", OF_A_PAPER)
def test_every_value_names_its_source_or_says_that_there_is_none(name):
    lines = PRESETS[name].read_text().splitlines()
    told = True
    for number, line in enumerate(lines, start=1):
        if line.startswith(("description", "#", "[")) or not line.strip() or line.strip() in ("methods = [", "]"):
            continue
        told = "# S" in line or "# OPEN" in line or (told and line.startswith("    "))
        assert told, f"line {number}: {line}"


def sweep(name):
    return Sweep.of(sweep_file.read(PRESETS[name]), name)


@pytest.mark.parametrize("task", OFFICIAL)
def test_adalora_official(task):
    made = sweep(f"adalora-official/{task}")
    rows, warmup, epochs, tokens = OFFICIAL[task]
    ((_, method),) = method_cells(made)
    ((name, problem),) = task_cells(made)
    assert (name, problem.max_length, made.train.epochs) == (f"glue/{task}", tokens, epochs)
    updates = made.train.budget(rows - min(rows // 10, 1000))
    assert warmup is None or math.ceil(made.train.warmup * updates) == warmup
    assert method.tinit + method.tfinal < updates
    assert (method.target_rank, method.beta1, method.beta2) == (1, 0.85, 0.85)


def test_every_official_task_has_its_preset():
    assert {name for name in PRESETS if "/" in name} == {f"adalora-official/{task}" for task in OFFICIAL}


def test_paper_glue():
    made = sweep("paper-glue")
    methods = method_cells(made)
    assert [name for name, _ in methods] == ["full", "hadapter", "padapter", "lora", "adalora", *3 * ["debora"]]
    assert all(method.weight_decay == 1e-3 for _, method in methods)
    by_name = dict(methods)
    assert (by_name["lora"].rank, by_name["lora"].alpha) == (8, 32)
    assert (by_name["adalora"].init_rank, by_name["adalora"].target_rank) == (12, 8)
    assert (by_name["hadapter"].bottleneck, by_name["padapter"].bottleneck) == (32, 64)
    assert [method.tau for name, method in methods if name == "debora"] == [16, 16, 16]
    assert len(task_cells(made)) == 8
    assert tomllib.loads(PRESETS["paper-glue"].read_text())["train"]["schedule"] == "constant"
