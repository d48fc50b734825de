"""LoRA with gates: the forward pass, the soft threshold, what is live, counts, cuts and exports, with the methods that
share them."""

import numpy as np
import pytest
import torch
from peft import PeftConfig
from torch import nn

from harness.contracts import METHOD_CONTRACTS, Subject
from harness.contracts.methods import (
    a_cut_to_a_rank_has_it_and_is_undone,
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    counts_are_right,
    every_size_is_counted,
    nothing_is_pickled,
    the_same_seed_gives_the_same_record,
)
from harness.contracts.subject import method_of
from methods.shared.gated_lora import soft_threshold
from tests.support.refusals import assert_refused
from tests.support.small_lora import NETWORKS, FakeStep, adapted, assert_export_is_stock_lora, outputs, updates
from tests.support.trained import trained

FEW_LEFT = {
    "sora": "sora[rank=4,values=4,components=7,threshold=0,gate_ratio=2,penalty=0.5]",
    "codyra": "codyra[rank=4,values=4,components=7,threshold=0]",
}
NONE_LEFT = ("sora[rank=3,threshold=10]", "codyra[rank=3,threshold=10,values=2]")


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """Some layers have no live components left, and two learning rates."""
    contract(Subject(FEW_LEFT["sora"], tmp_path))


def set_gates(adaptation, seed=1):
    """Random gates, one of each layer 0."""
    generator = torch.Generator().manual_seed(seed)
    for gate in adaptation.gates().values():
        gate.data.copy_(torch.randn(len(gate), generator=generator))
        gate.data[1] = 0


def as_matrices(adaptation):
    """scale B diag(g) A of each layer, from its raw parameters."""
    found = {}
    for name, layer in adaptation.layers.items():
        B, A = (part["default"].weight.detach().flatten(1).numpy() for part in (layer.lora_B, layer.lora_A))
        gate = adaptation.gates()[name].detach().numpy()
        found[name] = layer.scaling["default"] * (B * gate) @ A
    return found


class TestModel:
    @pytest.mark.parametrize("network", NETWORKS)
    def test_it_computes_with_the_gates_and_so_does_what_is_exported(self, network):
        adaptation = adapted("sora", network, {})
        set_gates(adaptation)
        weights, found = as_matrices(adaptation), outputs(adaptation, network)
        for name, update in updates(adaptation).items():
            np.testing.assert_allclose(update, weights[name], atol=1e-12)
        assert adaptation.ranks() == {"0": 2, "2": 2}
        for name, layer in adaptation.layers.items():
            base = layer.get_base_layer().weight.data
            base += torch.from_numpy(weights[name]).view_as(base)
            layer.enable_adapters(False)
        torch.testing.assert_close(outputs(adaptation, network), found, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("network", NETWORKS)
    def test_a_cut_keeps_the_largest_gates(self, network):
        adaptation = adapted("sora", network, {})
        set_gates(adaptation)
        gates = {name: gate.detach().clone() for name, gate in adaptation.gates().items()}
        with adaptation.at_rank(1):
            assert adaptation.ranks() == {"0": 1, "2": 1}
            for name, gate in adaptation.gates().items():
                assert gate.abs().max() == gates[name].abs().max()
        assert all(torch.equal(gate, gates[name]) for name, gate in adaptation.gates().items())

    def test_a_live_component_counts_outputs_and_inputs(self, tmp_path):
        """Of layers that are not square, where twice their width is another number."""
        settings = 'rank=4,values=4,components=3,target_modules=["intermediate.dense"]'
        started = trained(f"sora[{settings}]", tmp_path)
        count, ranks = started.training.sizes.parameters(), started.adaptation.ranks()
        shapes = {name: started.before.shape(name) for name in ranks}
        assert all(outputs != inputs for outputs, inputs in shapes.values())
        assert count.adapter_final == sum(rank * sum(shapes[name]) for name, rank in ranks.items())
        assert count.adapter_initial == count.adapter_peak == 4 * sum(map(sum, shapes.values()))
        assert count.stored_bytes == 4 * (count.adapter_final + count.head)


class TestThreshold:
    @pytest.mark.parametrize("threshold", [0.0, 0.1, 0.75])
    def test_it_is_the_proximal_step(self, threshold):
        """The x of least (x - v)^2 / 2 + threshold |x|, by brute force."""
        values = torch.linspace(-1.2, 1.2, 49, dtype=torch.float64)
        grid = torch.linspace(-1.5, 1.5, 30_001, dtype=torch.float64)
        costs = (grid - values[:, None]).square() / 2 + threshold * grid.abs()
        torch.testing.assert_close(soft_threshold(values, threshold), grid[costs.argmin(1)], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("method", ["sora", "codyra"])
    def test_it_takes_its_own_size_off_every_gate_or_leaves_none(self, method):
        """Those between one and two thresholds, too."""
        adaptation = adapted(
            method, "linear", {"threshold": 0.3, "values": 2} if method == "codyra" else {"threshold": 0.3}
        )
        before = torch.tensor([[0.29, -0.31, 0.59], [-0.61, 0.0, 2.0]], dtype=torch.float64)
        for gate, values in zip(adaptation.gates().values(), before, strict=True):
            gate.data.copy_(values)
        row = adaptation.after_step(FakeStep(10))
        found = torch.stack(list(adaptation.gates().values())).detach()
        expected = torch.tensor([[0.0, -0.01, 0.29], [-0.31, 0.0, 1.7]], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert row["threshold"] == 0.3
        assert (row["rank"], row["ranks"].tolist()) == (4, [2, 2])

    @pytest.mark.parametrize("most", [1, 2, 5])
    def test_a_budget_raises_it_to_the_least_that_does(self, most):
        """So the largest of all layers stay, in their order, less what the largest of the others was."""
        adaptation = adapted("sora", "linear", {"components": most, "values": 2, "dense": 0.5, "threshold": 1e-4})
        gates = torch.tensor([[0.5, -0.2, 0.9], [-0.7, 0.1, 0.3]], dtype=torch.float64)

        def after(used):
            for gate, values in zip(adaptation.gates().values(), gates, strict=True):
                gate.data.copy_(values)
            row = adaptation.after_step(FakeStep(used))
            return row, torch.stack(list(adaptation.gates().values())).detach()

        row, found = after(5)
        assert (row["threshold"], row["rank"]) == (1e-4, 6)
        row, found = after(6)
        level = sorted(gates.abs().flatten().tolist(), reverse=True)[most]
        assert row["rank"] == most
        torch.testing.assert_close(found, gates.sign() * (gates.abs() - level).clamp(min=0), rtol=0, atol=1e-12)

    def test_a_gate_at_0_comes_back_where_its_step_is_above_the_threshold(self):
        """Its gradient is that of a component which is not there yet."""
        for threshold, live in ((1e-4, 3), (1e-2, 2)):
            adaptation = adapted("sora", "linear", {"threshold": threshold, "learning_rate": 1e-3})
            set_gates(adaptation)
            inputs = torch.randn(7, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            adaptation.model(inputs).square().sum().backward()
            adaptation.optimizer.step()
            adaptation.after_step(FakeStep(1))
            assert set(adaptation.ranks().values()) == {live}

    @pytest.mark.parametrize("name", NONE_LEFT)
    @pytest.mark.parametrize(
        "contract",
        [
            counts_are_right,
            every_size_is_counted,
            a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
            the_same_seed_gives_the_same_record,
            nothing_is_pickled,
            a_cut_to_a_rank_has_it_and_is_undone,
        ],
        ids=lambda contract: contract.__name__,
    )
    def test_contracts_where_nothing_is_left(self, contract, name, tmp_path):
        contract(Subject(name, tmp_path))

    @pytest.mark.parametrize("name", NONE_LEFT)
    def test_where_nothing_is_left_the_head_trains_and_the_export_is_the_backbone_with_it(self, name, tmp_path):
        started = trained(name, tmp_path)
        assert set(started.adaptation.ranks().values()) == {0}
        assert started.training.sizes.parameters().adapter_final == 0
        losses = [row["loss"] for row in started.training.history]
        assert np.mean(losses[-6:]) < np.mean(losses[:6])
        assert_export_is_stock_lora(started, tmp_path / "export")


@pytest.mark.parametrize(
    "name", [*FEW_LEFT.values(), "sora[rank=4,threshold=0.05]", "codyra[rank=4,values=6,threshold=0.2]"]
)
def test_an_export_is_the_stock_lora_of_the_live_components(name, tmp_path):
    started = trained(name, tmp_path)
    assert 0 < sum(started.adaptation.ranks().values()) < 48
    assert_export_is_stock_lora(started, tmp_path / "export")
    with started.adaptation.at_rank(1):
        started.adaptation.export(tmp_path / "cut")
    assert set(PeftConfig.from_pretrained(str(tmp_path / "cut")).rank_pattern.values()) == {1}


@pytest.mark.parametrize("name", FEW_LEFT)
def test_a_budget_falls_to_its_end(name, tmp_path):
    started = trained(FEW_LEFT[name], tmp_path)
    ranks = [row["rank"] for row in started.training.history]
    assert list(dict.fromkeys(ranks)) == [48, 34, 21, 7]
    assert sum(started.adaptation.ranks().values()) == 7


@pytest.mark.parametrize("method", ["sora", "codyra"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("rank=4,components=49", "components = 49 is above the 48 that there are"),
        ("components=0", ".components = 0 is not allowed"),
        ("threshold=-1", ".threshold = -1 is not allowed"),
        ("values=1", ".values = 1 is not allowed"),
        ("dense=1", ".dense = 1 is not allowed"),
        ("gate_init=zeros", ".gate_init = 'zeros' is not allowed: it should be 'normal' or 'ones'"),
    ],
)
def test_bad_settings_are_one_line(settings, message, method, tmp_path, capsys):
    assert_refused(f"{method}[{settings}]", message, tmp_path, capsys, "--batches", "120")


def test_a_form_for_stock_peft_has_the_scale():
    for name, scale in (("sora[rank=4,alpha=6]", 1.5), ("codyra[rank=4]", 1.0)):
        form = method_of(name).peft_form({"query": 4, "key": 2, "value": 0})
        assert form.config["lora_alpha"] / form.config["r"] == scale
        assert form.config["alpha_pattern"]["^key"] / 2 == scale


def test_layers_of_the_backbone_named_gate_are_no_gates():
    """As in LLaMA, whose adapters' names hold "gate": only the gates have the ratio."""
    from harness import registry
    from harness.method import Backbone

    module = nn.ModuleDict({"gate_proj": nn.Linear(4, 4), "lora": nn.Linear(4, 4)})
    method = registry.make_method("sora", {"rank": 2, "gate_ratio": 5.0})
    adaptation = method.start(Backbone(module, (), ("gate_proj", "lora")), None, None, torch.Generator())
    gates = {id(gate) for gate in adaptation.gates().values()}
    for group in adaptation.optimizer.param_groups:
        assert len({id(p) in gates for p in group["params"]}) == 1
        assert group["lr"] == pytest.approx(5e-3 if id(group["params"][0]) in gates else 1e-3)
