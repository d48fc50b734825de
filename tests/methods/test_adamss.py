"""AdaMSS: its update against dense matrices, PEFT's allocation and ours, exact resume, export with biases."""

import itertools
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject
from harness.contracts.methods import a_run_interrupted_after_every_update_equals_the_uninterrupted_one
from harness.contracts.subject import method_of
from harness.errors import InputError
from harness.method import Backbone
from harness.spec import TrainSpec
from tests.support.refusals import assert_refused
from tests.support.small_lora import FakeStep, assert_export_is_stock_lora, truncated
from tests.support.trained import trained

TINY = "basis_rank=8,subspaces=4"  # of the synthetic task's 12 layers: 48 subspaces
SCHEDULE = "init_warmup=1,final_warmup=13,mask_interval=4"


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """PEFT's allocation. Ours is tried with the other methods."""
    schedule = "init_warmup=1,final_warmup=7,mask_interval=3"
    contract(Subject(f"adamss[{TINY},target_subspaces=7,{schedule},learning_rate=5e-3]", tmp_path, batches=10))


def test_a_resume_between_two_allocations_has_their_averages(tmp_path):
    """Ours, in a few updates more; layers without components are among them."""
    name = f"adamss[{TINY},components=7,init_warmup=1,final_warmup=4,mask_interval=3]"
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one(Subject(name, tmp_path, batches=7))


def network(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7, bias=bias), nn.Tanh(), nn.Linear(7, 8, bias=bias)).double()


def adapted(settings, bias=True, batches=10):
    """Two layers in float64 with random subspaces."""
    method = registry.make_method("adamss", {"basis_rank": 7, "subspaces": 3} | settings)
    backbone = Backbone(network(bias), (), ("0", "2"))
    data = type("Data", (), {"size": 100})()
    adaptation = method.start(backbone, TrainSpec(batches=batches), data, torch.Generator())
    with torch.no_grad():
        for name, parameter in adaptation.model.named_parameters():
            if "adamss_" in name:
                parameter.normal_()
    return adaptation


def subspaces(layer):
    """(rows, B_i, A_i) of a layer as PEFT keeps them."""
    clusters = layer.seg_result["default"]
    return [
        (clusters[number].tolist(), B, A)
        for number, (B, A) in enumerate(zip(layer.adamss_B["default"], layer.adamss_A["default"], strict=True))
    ]


def dense(layer, bias=True):
    """The update with its bias column, row by row."""
    V = layer.adamss_newB["default"].numpy()
    update = np.zeros((layer.out_features, V.shape[1]))
    for rows, B, A in subspaces(layer):
        for place, row in enumerate(rows):
            update[row] += B.detach().numpy()[place] @ A.detach().numpy() @ V
    return update if bias else np.pad(update, ((0, 0), (0, 1)))


class TestUpdate:
    @pytest.mark.parametrize("bias", [True, False])
    def test_the_model_computes_it_and_every_row_is_in_one_cluster(self, bias):
        adaptation = adapted({"subspace_rank": 2}, bias)
        x = torch.randn(5, 9, dtype=torch.float64)
        layer, base = adaptation.layers["0"], network(bias)[0]
        assert sorted(row for rows, _, _ in subspaces(layer) for row in rows) == list(range(7))
        with torch.no_grad():
            found = (layer(x) - base(x)).numpy()
        update = dense(layer, bias)
        np.testing.assert_allclose(found, x.numpy() @ update[:, :9].T + update[:, 9], atol=1e-12)

    def test_its_directions_span_the_weights_rows(self):
        """Of the weight with its bias; PEFT finds them in float32."""
        layer, base = adapted({}).layers["0"], network()[0]
        W = torch.cat([base.weight, base.bias[:, None]], 1).detach().numpy()
        V = layer.adamss_newB["default"].numpy()
        np.testing.assert_allclose(V @ V.T, np.eye(7), atol=1e-5)
        np.testing.assert_allclose(W @ V.T @ V, W, atol=1e-5)

    def test_one_cluster_of_all_directions_is_a_lora(self):
        """W + B (A V^T): under plain SGD, which knows no basis, A V^T moves as the A of a LoRA does."""
        adaptation = adapted({"subspaces": 1, "subspace_rank": 2, "basis_rank": 7, "target_modules": ["2"]}, bias=False)
        layer, x = adaptation.layers["2"], torch.randn(6, 9, dtype=torch.float64)
        ((rows, B, A),) = subspaces(layer)
        assert rows == list(range(8))
        V, base = layer.adamss_newB["default"], network(bias=False)
        pair = [B.detach().clone(), A.detach() @ V]
        for _ in range(10):
            loss = adaptation.model(x).square().sum()
            gradients = torch.autograd.grad(loss, [B, A])
            pair = [each.detach().requires_grad_(True) for each in pair]
            hidden = base[1](base[0](x))
            ours = (hidden @ base[2].weight.T + hidden @ pair[1].T @ pair[0].T).square().sum()
            torch.testing.assert_close(loss, ours, rtol=1e-5, atol=0)
            with torch.no_grad():
                for own, gradient in zip((B, A), gradients, strict=True):
                    own -= 1e-4 * gradient
                pair = [own - 1e-4 * g for own, g in zip(pair, torch.autograd.grad(ours, pair), strict=True)]

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("rank", [1, 2, 5])
    def test_a_cut_loses_least_of_all_that_keep_the_clusters(self, rank, bias):
        """Against every way to give the three clusters ranks of 0 to 2 with that sum."""
        adaptation = adapted({"subspace_rank": 2}, bias)
        before = {name: dense(layer, bias) for name, layer in adaptation.layers.items()}
        with adaptation.at_rank(rank):
            errors = {n: np.linalg.norm(dense(layer, bias) - before[n]) for n, layer in adaptation.layers.items()}
        for name, layer in adaptation.layers.items():
            np.testing.assert_array_equal(dense(layer, bias), before[name])
            blocks = [before[name][rows] for rows, _, _ in subspaces(layer)]
            least = min(
                math.sqrt(sum(((b - truncated(b, k)) ** 2).sum() for b, k in zip(blocks, ranks, strict=True)))
                for ranks in itertools.product(range(3), repeat=3)
                if sum(ranks) == rank
            )
            assert errors[name] == pytest.approx(least, rel=1e-5)


class TestAllocation:
    def scores(self, adaptation, gradients, beta1=0.85, beta2=0.85):
        """Of each subspace from its gradients since the last allocation, in the order of layers and clusters."""
        found = []
        for name, layer in adaptation.layers.items():
            for number, (_, B, A) in enumerate(subspaces(layer)):
                total = 0.0
                for letter, parameter in (("B", B), ("A", A)):
                    smoothed = uncertainty = np.zeros(parameter.shape)
                    for step in gradients:
                        sensitivity = np.abs(parameter.detach().numpy() * step[name, letter, number].numpy())
                        uncertainty = beta2 * uncertainty + (1 - beta2) * np.abs(sensitivity - smoothed)
                        smoothed = beta1 * smoothed + (1 - beta1) * sensitivity
                    total += float((smoothed * uncertainty).mean())
                found.append(total)
        return found

    def test_the_subspaces_of_the_highest_scores_stay_and_the_others_are_gone(self):
        """Against loops over single numbers. Six subspaces; the first allocation is at the end."""
        settings = {"components": 2, "init_warmup": 1, "final_warmup": 5, "mask_interval": 9, "beta1": 0.7}
        adaptation, generator, seen = adapted(settings), torch.Generator().manual_seed(1), []
        for index in range(7):
            gradients = {}
            for name, layer in adaptation.layers.items():
                for number, (_, B, A) in enumerate(subspaces(layer)):
                    for letter, parameter in (("B", B), ("A", A)):
                        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                        gradients[name, letter, number] = gradient
                        parameter.grad = gradient.clone() if parameter.requires_grad else None
            seen.append(gradients)
            if index == 5:
                expected = self.scores(adaptation, seen[1:6], beta1=0.7)
                before = {name: dense(layer) for name, layer in adaptation.layers.items()}
            row = adaptation.after_step(Told(index + 1, index))
            assert (row == {}) == (index != 5)
        kept = sorted(np.argsort(expected)[-2:])
        live = [B.requires_grad for layer in adaptation.layers.values() for _, B, _ in subspaces(layer)]
        assert [place for place, on in enumerate(live) if on] == kept
        assert sum(adaptation.ranks().values()) == 2
        place = 0
        for name, layer in adaptation.layers.items():
            update = dense(layer)
            for rows, _, _ in subspaces(layer):
                np.testing.assert_array_equal(update[rows], before[name][rows] if place in kept else 0.0)
                place += 1

    @pytest.mark.parametrize("components", [1, 9, 47, 48])
    def test_exactly_so_many_components_stay(self, components, tmp_path):
        """PEFT could not stop one alone. Numbers between fall along the schedule's power."""
        run = trained(f"adamss[{TINY},components={components},{SCHEDULE},exponent=2,learning_rate=1e-2]", tmp_path)
        assert sum(run.adaptation.ranks().values()) == components
        falls = {t: int(components + (48 - components) * ((13 - t) / 12) ** 2) for t in (1, 5, 9, 13)}
        changes, now = {}, 48
        for index, size in falls.items():
            if size < now:
                changes[index], now = size, size
        found = {row["update"]: row["training_subspaces"] for row in run.training.history if "rank" in row}
        assert found == changes
        assert all(size.rank in (48, *changes.values()) for size in run.training.sizes.trajectory)

    @pytest.mark.parametrize(
        ("schedule", "target", "left"),
        [
            ("init_warmup=1,final_warmup=2,mask_interval=2", 9, 8),
            ("init_warmup=1,final_warmup=2,mask_interval=2", 47, 46),
            ("init_warmup=1,final_warmup=2,mask_interval=2", 48, 48),
            ("init_warmup=1,final_warmup=2,mask_interval=2", 1, 0),
            ("init_warmup=1,final_warmup=9,mask_interval=4", 5, 4),
            ("init_warmup=1,final_warmup=10,mask_interval=1,exponent=2", 10, 10),  # 10 are left before the last one
        ],
    )
    def test_of_peft_s_target_one_less_trains_on_or_that_many(self, schedule, target, left, tmp_path):
        """What it stops stays in effect, and counts."""
        run = trained(f"adamss[{TINY},target_subspaces={target},{schedule},learning_rate=1e-2]", tmp_path, batches=14)
        adaptation = run.adaptation
        training = [p for n, p in adaptation.model.named_parameters() if ".adamss_B." in n and p.requires_grad]
        stopped = [p for n, p in adaptation.model.named_parameters() if ".adamss_B." in n and not p.requires_grad]
        assert (len(training), len(stopped)) == (left, 48 - left)
        assert all(p.count_nonzero() for p in stopped)
        assert sum(adaptation.ranks().values()) == 48
        assert len({size.adapter_parameters for size in run.training.sizes.trajectory}) == 1
        assert_export_is_stock_lora(run, tmp_path / "export")

    @pytest.mark.parametrize("interval", [1, 3, 5])
    def test_it_is_the_gateway_s_bit_for_bit(self, interval, tmp_path):
        """Where PEFT's own schedule, in multiples of the interval, ends where ours does."""
        ours = f"{SCHEDULE.split(',')[0]},final_warmup=15,mask_interval={interval},learning_rate=1e-2"
        shared = f"asa_target_subspaces=10,{ours}"
        one, two = (
            trained(name, tmp_path)
            for name in (f"adamss[{TINY},{shared}]", f"peft[type=adamss,r=8,num_subspaces=4,use_asa=true,{shared}]")
        )
        assert [row["loss"] for row in one.training.history] == [row["loss"] for row in two.training.history]
        stopped = two.adaptation.state_dict()["stopped"]
        assert one.adaptation.state_dict()["stopped"].keys() == stopped.keys() != set()
        assert one.training.sizes.parameters().adapter_final == two.training.sizes.parameters().adapter_final

    def test_all_of_them_are_no_allocation(self, tmp_path):
        plain, kept = (trained(f"adamss[{TINY}{more}]", tmp_path) for more in ("", ",components=48"))
        assert [row["loss"] for row in plain.training.history] == [row["loss"] for row in kept.training.history]


class Told(FakeStep):
    def resized(self) -> None:
        """Nothing counts here."""


class TestExport:
    @pytest.mark.parametrize("settings", ["", ",components=1", ",components=9", ",target_subspaces=9"])
    def test_it_is_a_stock_lora_with_the_biases(self, settings, tmp_path):
        """Layers without components are no target; the file is as large as `stored_bytes` says."""
        run = trained(f"adamss[{TINY}{settings},learning_rate=1e-2]", tmp_path)
        assert_export_is_stock_lora(run, tmp_path / "export")
        tensors = load_file(tmp_path / "export" / "adapter_model.safetensors")
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == run.adaptation.stored_bytes()

    @pytest.mark.parametrize("bias", [True, False])
    def test_the_same_in_float64(self, bias, tmp_path):
        adaptation, x = adapted({}, bias), torch.randn(4, 9, dtype=torch.float64)
        adaptation.export(tmp_path)
        loaded = PeftModel.from_pretrained(network(bias), tmp_path).double()
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), adaptation.model(x), rtol=0, atol=1e-6)  # PEFT loads in float32
        assert loaded.peft_config["default"].lora_bias is bias
        with torch.no_grad():
            layer = loaded.base_model.model.get_submodule("0")
            assert bias is False or layer.lora_B["default"].bias.abs().max() > 1e-3

    def test_within_a_cut(self, tmp_path):
        run = trained(f"adamss[{TINY},learning_rate=1e-2]", tmp_path)
        with run.adaptation.at_rank(2):
            run.adaptation.export(tmp_path / "cut")
            inputs = run.task.collate(run.training.encoded, range(8), None).inputs
            with torch.no_grad():
                wanted = run.adaptation.model.eval()(**inputs).logits
        loaded = PeftModel.from_pretrained(run.before.module, tmp_path / "cut").eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, wanted, rtol=0, atol=1e-5)
        assert {len(v) for v in run.method.singular_values(tmp_path / "cut").values()} == {2}

    def test_stock_peft_trains_a_lora_in_its_place(self):
        form = method_of("adamss").peft_form({"a": 4, "b": 1, "c": 0})
        assert (form.config["r"], form.config["lora_alpha"], form.config["alpha_pattern"]) == (4, 4.0, {"^b": 1.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("basis_rank=4", "subspaces * subspace_rank = 5 is above basis_rank = 4"),
        ("subspaces=17", "subspaces * subspace_rank = 17 is above the smaller side of layer"),
        ("components=61", "components = 61 is above the 60 that there are"),
        ("target_subspaces=61", "target_subspaces = 61 is above the 60 that there are"),
        ("components=3,target_subspaces=3", "components = 3 and target_subspaces = 3 are both set; give one"),
        ("components=3,subspace_rank=2", "components = 3 should be a multiple of subspace_rank = 2"),
        ("components=0", "adamss.components = 0 is not allowed"),
        ("mask_interval=1.5", "mask_interval = 1.5 should be a share of the updates below 1, or a whole number"),
        ("init_warmup=0.5", "init_warmup = 0.5 should be below final_warmup = 0.5"),
        ("init_warmup=0.5,final_warmup=9", "should both be shares below 1, or both numbers of updates"),
        ("components=3,init_warmup=1,final_warmup=9", "do not fit into 9 updates: they take at least 10"),
        ("components=3,init_warmup=0.3,final_warmup=0.31", "do not fit into 9 updates: they take at least 15"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    assert_refused(f"adamss[{settings}]", message, tmp_path, capsys, "--batches", "9")


@pytest.mark.parametrize("shares", [(0.025, 0.5), (0.3, 0.31), (0.5, 0.999), (0, 0.01)])
def test_the_least_budget_that_is_named_does(shares):
    method = method_of("adamss[components=3,init_warmup={:g},final_warmup={:g}]".format(*shares))
    with pytest.raises(InputError, match="they take at least") as raised:
        method.schedule(1)
    least = int(str(raised.value).split()[-1])
    first, last, interval = method.schedule(least)
    assert 0 <= first < last < least
    assert interval >= 1
    with pytest.raises(InputError):
        method.schedule(least - 1)


@pytest.mark.parametrize("budget", [8, 100, 3000])
def test_shares_and_updates_are_one_schedule(budget):
    shares = method_of("adamss[components=3,init_warmup=0.125,final_warmup=0.5,mask_interval=0.25]").schedule(budget)
    assert shares == tuple(math.floor(share * budget) for share in (0.125, 0.5, 0.25))


def test_layers_that_peft_leaves_out_are_a_reason():
    for layer, kind in ((nn.Conv2d(8, 8, 3), "Conv2d"), (Conv1D(8, 8), "Conv1D")):
        reason = method_of("adamss").unsupported(Backbone(nn.Sequential(layer), (), ("0",)))
        assert reason == f"layer '0' is of kind {kind}, and PEFT's AdaMSS adapts nn.Linear alone"


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ("", "10 components in 2 layers"),
        ("components=4", "10 components in 2 layers; 4 are left after update 51 of 100, every 5 from 3"),
        ("target_subspaces=4", "10 components in 2 layers; PEFT's target is 4 subspaces, reached after update 51 of"),
    ],
)
def test_a_dry_run_says_how_many_there_are_when(settings, note):
    backbone = Backbone(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (), ("0", "1"))
    (found,) = method_of(f"adamss[{settings}]").notes(backbone, TrainSpec(batches=100), 100)
    assert found.startswith(note)
