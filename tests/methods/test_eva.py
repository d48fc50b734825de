"""EVA as a method of its own: PEFT's start to the bit, ranks that are conserved, batches that count."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from harness import registry
from harness.cli import main
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.contracts.subject import method_of
from harness.errors import InputError
from harness.method import Backbone
from harness.run.training import Training
from harness.spec import TrainSpec
from methods.eva import whiten_once
from tests.support.network import KINDS, method_training
from tests.support.trained import trained

LAYERS = 12  # of the synthetic task's BERT
SHARED = [f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")]  # equal inputs


def prepared(settings: str, batches: int = 24, seed: int = 0):
    run = start(Subject(f"eva[{settings}]", Path(), batches=batches), seed=seed)
    run.training.prepare()
    return run


def directions(run) -> dict[str, torch.Tensor]:
    return {name: layer.lora_A["default"].weight.detach() for name, layer in run.adaptation.layers.items()}


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts_with_layers_without_rank(contract, tmp_path):
    """Of one component a layer, some layers get two and others none."""
    contract(Subject("eva[rank=1,rho=2,tau=0.5,adjust_scaling_factors=false]", tmp_path))


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [("rank=2,rho=1,tau=0.5", {2}), ("rank=2,tau=0.5", {1, 2, 3}), ("rank=1,tau=0.5", {0, 1, 2})],
)
def test_the_sum_of_ranks_is_the_budget(settings, ranks):
    run = prepared(settings)
    found = run.adaptation.ranks()
    assert list(found) == list(run.before.layers)
    assert sum(found.values()) == run.method.rank * LAYERS
    assert set(found.values()) == ranks
    assert max(ranks) <= run.method.most_components


def test_directions_are_orthonormal_and_the_function_stays():
    run = prepared("rank=2,tau=0.5")
    for A in directions(run).values():
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)
    batch = run.task.collate(run.training.encoded, range(8), None)
    with torch.no_grad():
        expected = run.before.module.eval()(**batch.inputs).logits
        assert torch.equal(run.adaptation.model.eval()(**batch.inputs).logits, expected)


@pytest.mark.parametrize("options", ["rho=2,tau=0.5", "rho=1,tau=0.9", "rho=2,tau=0.5,adjust_scaling_factors=false"])
def test_it_is_the_gateway_s_to_the_bit(options):
    own = trained(f"eva[rank=2,alpha=4,{options}]")
    gateway = trained(f"peft[type=lora,r=2,lora_alpha=4,init_lora_weights=eva,eva_config={{{options}}}]")
    assert own.training.history[0].pop("rank") == 2 * LAYERS
    own.training.history[0].pop("ranks")
    assert own.training.history == gateway.training.history
    assert {name: rank for name, rank in own.adaptation.ranks().items() if rank} == gateway.adaptation.ranks()
    for one, two in zip(
        own.adaptation.model.state_dict().items(), gateway.adaptation.model.state_dict().items(), strict=True
    ):
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1])


def test_directions_are_those_of_the_inputs_covariance():
    """Against the eigenvectors of all rows at once, of a layer whose inputs are spread unevenly."""
    run = start(Subject("eva[rank=2,rho=1,tau=0.99]", Path(), batches=24))
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        norm = run.adaptation.model.get_submodule("base_model.model.bert.embeddings.LayerNorm")
        norm.weight.copy_(torch.tensor([4.0, 2.0] + 14 * [0.1]))
    layer = run.adaptation.layers[SHARED[0]].get_base_layer()
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].flatten(0, -2)))
    run.training.prepare()
    handle.remove()
    rows = torch.cat(seen[1:]).double()  # the first batch only tells which layers have equal inputs
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    found = directions(run)[SHARED[0]].double()
    assert values[-1] > 2 * values[-2] > 20 * values[-3]
    cosines = (found * vectors[:, [-1, -2]].T).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-3)


def test_whitened_directions_are_divided_once():
    """PEFT divides those of layers with equal inputs once for each of them: here three times."""
    plain, whitened = (directions(prepared(f"rank=2,rho=1,tau=0.5,whiten={flag}")) for flag in ("false", "true"))
    run = start(Subject("peft[type=lora,r=2,init_lora_weights=eva,eva_config={rho=1,tau=0.5,whiten=true}]", Path()))
    layer = run.adaptation.model.get_submodule(f"base_model.model.{SHARED[0]}")
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().flatten(0, -2)))
    run.training.prepare()
    handle.remove()
    rows = torch.cat(seen[1:])
    for name in SHARED:
        sigma = 1 / whitened[name].norm(dim=1) ** 2
        torch.testing.assert_close(whitened[name], plain[name] / sigma.sqrt()[:, None])
        peft = run.adaptation.model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
        torch.testing.assert_close(peft, plain[name] / sigma[:, None] ** 1.5)
        of_all_rows = ((rows - rows.mean(0)) @ plain[name].T).norm(dim=0)  # the analysis may have stopped before
        torch.testing.assert_close(sigma, of_all_rows, rtol=0.2, atol=0)


def test_whitening_follows_who_shares_memory():
    """Three layers of ranks 3, 1, 0 share one matrix; another has its own."""
    torch.manual_seed(0)
    unit = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q.T.contiguous()
    sigma = torch.tensor([9.0, 4.0, 2.0], dtype=torch.float64)
    times = torch.tensor([2, 1, 1])  # layers that have this row
    common = unit * sigma[:, None] ** (-times[:, None] / 2)
    alone = unit / sigma.sqrt()[:, None]
    whiten_once([common[:3], common[:1], common[:0], alone])
    for rows in (common, alone):
        torch.testing.assert_close(rows, unit / sigma.sqrt()[:, None])


@pytest.mark.parametrize("adjusted", [True, False])
def test_every_layer_has_the_scale_that_is_asked_for(adjusted):
    run = prepared(f"rank=2,alpha=6,tau=0.5,adjust_scaling_factors={str(adjusted).lower()}")
    for name, layer in run.adaptation.layers.items():
        rank = run.adaptation.ranks()[name]
        assert layer.scaling["default"] == pytest.approx(6 / (2 if adjusted else rank))


def test_batches_count_and_sizes_follow():
    run = start(Subject("eva[rank=2,tau=0.5]", Path()))
    run.training.prepare()
    assert 3 <= run.training.used == run.training.data.drawn["all"] < 24
    assert run.training.schedule_start == run.training.used
    assert all(part.training for part in run.adaptation.model.modules())
    count = run.training.sizes.parameters()
    sides = {name: sum(run.before.shape(name)) for name in run.before.layers}
    assert count.adapter_initial == 2 * sum(sides.values())
    assert count.adapter_final == sum(rank * sides[name] for name, rank in run.adaptation.ranks().items())
    run.training.update()
    run.training.fetch()
    row = run.training.history[0]
    assert (row["rank"], row["ranks"]) == (2 * LAYERS, list(run.adaptation.ranks().values()))


@pytest.mark.parametrize("settings", ["rank=1,tau=0.5", "rank=2,tau=0.5,whiten=true,adjust_scaling_factors=false"])
def test_an_export_is_the_trained_model_in_stock_peft(settings, tmp_path):
    run = trained(f"eva[{settings},learning_rate=1e-2]")
    run.adaptation.export(tmp_path)
    inputs = run.task.collate(run.training.encoded, range(8), None).inputs
    loaded = PeftModel.from_pretrained(run.before.module, tmp_path).eval()
    with torch.no_grad():
        expected = run.adaptation.model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-5)
    found = run.method.singular_values(tmp_path)
    assert {name: len(values) for name, values in found.items()} == {
        n: r for n, r in run.adaptation.ranks().items() if r
    }


def test_mixed_precision_has_no_part_in_the_start():
    """Within it products would be rounded, and torch has no QR decomposition in half precision."""
    full, mixed = (start(Subject("eva[rank=2,tau=0.5]", Path())) for _ in range(2))
    old = mixed.training
    train = old.train.model_copy(update={"precision": "bf16"})
    training = Training(old.adaptation, old.task, old.encoded, old.data, train, old.device, old.budget)
    full.training.prepare()
    training.prepare()
    assert not torch.is_autocast_enabled("cpu")
    assert training.used == full.training.used
    for name, A in directions(full).items():
        assert torch.equal(A, directions(mixed)[name])


def test_peft_form_has_the_scale_or_is_none():
    ranks = {"a": 3, "b": 1, "c": 0}
    form = method_of("eva[rank=2,alpha=6]").peft_form(ranks)
    assert form.config["lora_alpha"] / form.config["r"] == 3
    assert method_of("eva[adjust_scaling_factors=false]").peft_form(ranks) is None


def test_more_components_than_the_analysis_can_find():
    backbone = start(Subject("head", Path())).before
    with pytest.raises(InputError) as caught:
        method_of("eva[rank=9,rho=1]").unsupported(backbone)
    assert str(caught.value) == (
        f"rank = 9 and rho = 1 let a layer have 9 components, and '{SHARED[0]}' has 16 outputs and 16 inputs: "
        "rank times rho is at most 8 (the outputs, or half the inputs)"
    )
    with pytest.raises(InputError, match="rank = 8 and rho = 2 let a layer have 16 components"):
        method_of("eva").unsupported(backbone)
    assert method_of("eva[rank=4,rho=2]").unsupported(backbone) is None
    assert method_of("eva[rank=8,rho=1]").unsupported(backbone) is None


def test_the_most_components_that_are_allowed_can_be_found():
    assert sum(prepared("rank=4,rho=2,tau=0").adaptation.ranks().values()) == 4 * LAYERS


def test_convolutions_are_a_reason():
    backbone = Backbone(nn.Sequential(nn.Conv2d(9, 9, 3), nn.Linear(9, 9)), (), ("0", "1"))
    assert method_of("eva").unsupported(backbone) == "EVA is for linear layers, and layer '0' is a convolution"
    assert method_of('eva[rank=2,target_modules=["1"]]').unsupported(backbone) is None
    bare = dataclasses.replace(backbone, layers=())
    assert "no linear layer to adapt" in method_of("eva").unsupported(bare)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rho": 0.5}, "eva.rho = 0.5 is not allowed"),
        ({"rho": float("inf")}, "eva.rho = inf is not allowed"),
        ({"tau": 1.5}, "eva.tau = 1.5 is not allowed"),
        ({"roh": 1}, "Did you mean 'rho'?"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(InputError) as caught:
        registry.make_method("eva", setting)
    assert message in str(caught.value)


def test_the_budget_of_the_start(tmp_path, capsys):
    """The least is known before anything runs; the rest, the data say."""
    backbone = start(Subject("head", Path())).before
    (note,) = method_of("eva[rank=2]").notes(backbone, TrainSpec(batches=40), 99)
    assert note.startswith("24 components in 12 layers, at most 4 in one; at least 3 of 40 batches")
    assert prepared("rank=1,rho=1,tau=0", batches=4).training.used == 3
    with pytest.raises(RuntimeError, match=r"have not converged in 4 batches.*lower tau"):
        prepared("rank=2,tau=1", batches=5)
    options = ["--methods", "eva[rank=2]", "--tasks", "synthetic", "--batches", "3", "--results", str(tmp_path / "r")]
    assert main(["run", *options, "--executor", "serial"]) == 2
    assert "the budget is 3: give at least 4" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_layer_that_is_not_called_is_named():
    method = method_of('eva[rank=1,tau=0.5,target_modules=["linear","unused"]]')
    with pytest.raises(RuntimeError, match="does not call layer 'unused': leave it out of target_modules"):
        method_training(method, (*KINDS, "unused")).prepare()


def test_a_batch_of_too_few_rows_is_told():
    run = start(Subject("eva[rank=8,rho=1,tau=0.5]", Path()))
    run.training.data.draw = lambda stream: (0,)  # one example of 8 tokens
    with pytest.raises(
        RuntimeError, match=f"8 directions in the inputs of layer '{SHARED[0]}'.*at least 16 rows.*has 8"
    ):
        run.training.prepare()
