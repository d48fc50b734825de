"""Components that are removed for good, resuming after that, and the adapter that is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from harness.contracts.methods import a_run_interrupted_after_every_update_equals_the_uninterrupted_one
from harness.contracts.subject import Started, Subject
from tests.methods.debora.runs import (
    FAST,
    adaptation_of,
    dense,
    empty,
    logits,
    logits_without_adapter,
    numbers,
    started,
    watch,
)


def test_truncation_takes_the_eps_term_and_nothing_else():
    """Values, moments and the function of what is left are bit-equal; `jump` is the norm of the eps u v^T removed."""
    run = started(FAST + ",eps=0.25", batches=30)
    adaptation, held, removals = adaptation_of(run), {}, []

    def moments(parameter):
        state = adaptation.optimizer.state[parameter]
        return state["exp_avg"].clone(), state["exp_avg_sq"].clone(), state["step"].clone()

    def factors():
        return {n: (m.debora_U["default"], m.debora_V["default"]) for n, m in adaptation.layers.items()}

    def before(value):
        held["live"] = adaptation.search.live

    def after(moved):
        """The step is made, and the layers are not cut yet: what they would be at the new s."""
        weights = adaptation.search.weights[:, 1:].flatten()[held["live"]]
        new = (0.25 + 16 * weights).split(list(adaptation.ranks().values()))
        held["before"] = {n: (U, s, V) for (n, (U, _, V)), s in zip(numbers(adaptation).items(), new, strict=True)}
        held["moments"] = {n: [moments(p) for p in own] for n, own in factors().items()}
        held["objects"], held["dropped"] = factors(), dict(zip(adaptation.layers, moved.dropped, strict=True))

    watch(adaptation, before, after)
    while run.training.used < 30:
        held.clear()
        run.training.update()
        if "dropped" not in held or not any(map(any, held["dropped"].values())):
            continue
        square = 0.0
        for name, parts in numbers(adaptation).items():
            gone = held["dropped"][name]
            left = [i for i, flag in enumerate(gone) if not flag]
            assert (held["before"][name][1][gone] == 0.25).all()
            for old, new in zip(held["before"][name], parts, strict=True):
                assert torch.equal(old[..., left], new)
            U, _, V = held["before"][name]
            difference = sum(
                (0.25 * torch.outer(U[:, i], V[:, i]) for i, flag in enumerate(gone) if flag), 0 * dense(parts)
            )
            torch.testing.assert_close(dense(held["before"][name]) - dense(parts), difference, rtol=0, atol=1e-6)
            square += float((difference**2).sum())
            assert factors()[name] == held["objects"][name]
            for parameter, old_moments in zip(factors()[name], held["moments"][name], strict=True):
                average, squares, count = moments(parameter)
                assert average.shape == squares.shape == parameter.shape
                assert torch.equal(average, old_moments[0][:, left])
                assert torch.equal(squares, old_moments[1][:, left])
                assert torch.equal(count, old_moments[2])
        removals.append(square**0.5)
    run.training.fetch()
    assert len(removals) > 1
    assert all(removals)
    found = [row["jump"] for row in run.training.history if row.get("jump") and "gap" in row]
    assert found == pytest.approx(removals, rel=1e-4)
    parameters = {id(p) for group in adaptation.optimizer.param_groups for p in group["params"]}
    assert parameters == {id(p) for p in adaptation.model.parameters() if p.requires_grad}


def test_truncation_waits_for_n0():
    ranks = []
    run = started("rank=4,T_max=1,n0=3,step_size=0.5,search_fraction=1", batches=24)
    while run.training.used < 24:
        run.training.update()
        ranks.append(sum(run.adaptation.ranks().values()))
    assert ranks[:3] == [48] * 3
    assert ranks[3] < 48


def test_what_is_truncated_is_gone_from_counts_and_ranks():
    run = started(FAST, batches=40)
    run.training.run(lambda training: None)
    ranks, count = run.adaptation.ranks(), run.training.sizes.parameters()
    assert len(set(ranks.values())) > 1
    shapes = {name: run.before.shape(name) for name in ranks}
    assert count.adapter_final == sum(rank * (sum(shapes[name]) + 1) for name, rank in ranks.items())
    assert count.adapter_initial == count.adapter_peak == sum(4 * (sum(shape) + 1) for shape in shapes.values())
    backbone = sum(p.numel() for p in run.before.module.parameters())
    assert count.total == backbone + count.adapter_final
    rows = [row for row in run.training.history if "gap" in row]
    assert rows[-1]["rank"] == sum(ranks.values()) == rows[-1]["active_components"]
    assert sum(row["drop"] for row in rows) > 0
    assert all(row["gap"] >= 0 for row in rows)


@pytest.mark.parametrize("settings", ["step_rule=diminishing", "budget_scope=global"])
def test_resuming_amid_truncations_is_exact(tmp_path, settings):
    subject = Subject(f"debora[{FAST},search_fraction=0.8,{settings}]", tmp_path, batches=24)
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one(subject)


def test_one_global_simplex_loses_at_most_one_component_a_step():
    run = started(FAST + ",budget_scope=global,search_fraction=1", batches=30)
    run.training.run(lambda training: None)
    totals = [48] + [row["rank"] for row in run.training.history if "rank" in row]
    steps = [row for row in run.training.history if "rank" in row]
    for before, after, row in zip(totals, totals[1:], steps, strict=False):
        assert before - after in (0, row["drop"])
    assert totals[-1] < 48


def test_with_every_component_gone_the_head_still_trains(tmp_path):
    run = started("rank=4,T_max=100,n0=0,step_size=1", 5, batches=20)
    adaptation = adaptation_of(run)
    at_eps = [dense((U, torch.full_like(s, 1e-3), V)) for U, s, V in numbers(adaptation).values()]
    assert empty(adaptation) == pytest.approx(float(torch.stack([update.norm() for update in at_eps]).norm()), rel=1e-4)
    assert set(adaptation.ranks().values()) == {0}
    torch.testing.assert_close(logits(run), logits_without_adapter(run))
    head = {n: p.detach().clone() for n, p in adaptation.model.named_parameters() if ".modules_to_save." in n}
    run.training.update()
    assert adaptation.stream == "all"
    run.training.run(lambda training: None)
    assert all(not torch.equal(dict(adaptation.model.named_parameters())[n], p) for n, p in head.items())
    assert adaptation.adapter_parameters() == 0
    adaptation.export(tmp_path)
    expected = logits(run)
    adaptation.model = PeftModel.from_pretrained(run.before.module, tmp_path).eval()
    torch.testing.assert_close(logits(run), expected)


LOAD = """
import json, sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("harness", "methods", "tasks"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(1)
from peft import PeftModel
from transformers import BertForSequenceClassification

base = BertForSequenceClassification.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.loads(sys.argv[3]))).logits
assert not {"harness", "methods", "tasks"} & set(sys.modules)
print(json.dumps(logits.flatten().tolist()))
"""


def exported_logits(run: Started, adapter: Path) -> list[float]:
    """What plain PEFT computes with an exported adapter, in a process that cannot import this project."""
    base = adapter / "base"
    run.before.module.save_pretrained(base)
    batch = run.task.collate(run.training.encoded, range(8), None)
    tokens = json.dumps(batch.inputs["input_ids"].tolist())
    command = [sys.executable, "-I", "-c", LOAD, str(base), str(adapter), tokens]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_export_is_a_stock_lora_adapter(tmp_path):
    run = started(FAST + ",learning_rate=0.02", batches=40)
    run.training.run(lambda training: None)
    adaptation = adaptation_of(run)
    first = next(iter(adaptation.layers))
    flags = [name == first for name, rank in adaptation.ranks().items() for _ in range(rank)]
    adaptation.cut(adaptation.search.drop(flags))  # one layer at rank 0
    ranks = adaptation.ranks()
    assert len(set(ranks.values())) > 2
    adaptation.export(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert len(config["rank_pattern"]) == len(ranks) - 1
    expected = logits(run)
    assert exported_logits(run, tmp_path) == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    # The adapter's own part is large enough for the comparison to mean something.
    assert (expected - logits_without_adapter(run)).abs().max() > 1e-2
