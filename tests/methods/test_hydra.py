"""Hydra: both branches against dense matrices, LoRA as its limit, cuts, exact resume, export with the mended bias."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from harness import registry
from harness.contracts import Subject, start
from harness.contracts.methods import (
    a_cut_to_a_rank_has_it_and_is_undone,
    counts_are_right,
    only_the_intended_parameters_train,
    unchanged_output_at_the_start,
)
from harness.method import Backbone, as_matrix
from harness.spec import TrainSpec
from tests.support.network import KINDS, method_training
from tests.support.refusals import assert_refused
from tests.support.small_lora import assert_export_is_stock_lora, singular_values, truncated, updates
from tests.support.trained import trained

BRANCHES = (
    "parallel_rank=2,sequential_rank=3",
    "parallel_rank=4,sequential_rank=0",
    "parallel_rank=0,sequential_rank=4",
)
NETWORKS = {
    "linear": (lambda bias: nn.Sequential(nn.Linear(9, 7, bias=bias), nn.Tanh(), nn.Linear(7, 8, bias=bias)), (6, 9)),
    "convolution": (
        lambda bias: nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=bias), nn.Tanh(), nn.Conv2d(6, 5, 2, bias=bias)
        ),
        (2, 3, 8, 8),
    ),
}


ALONE, LOWER = ("parallel_rank=0,sequential_rank=4,scale=2", "fp32"), (BRANCHES[0], "bf16")


@pytest.mark.parametrize(
    ("settings", "dtype", "contract"),
    [
        (*ALONE, unchanged_output_at_the_start),
        (*ALONE, only_the_intended_parameters_train),
        (*ALONE, counts_are_right),
        (*ALONE, a_cut_to_a_rank_has_it_and_is_undone),
        (*LOWER, unchanged_output_at_the_start),
        (*LOWER, a_cut_to_a_rank_has_it_and_is_undone),
    ],
)
def test_contracts(settings, dtype, contract, tmp_path):
    """On the outputs alone, and on a backbone in a lower precision."""
    contract(Subject(f"hydra[{settings}]", tmp_path, backbone_dtype=dtype))


def hydra(**settings):
    return registry.make_method("hydra", {"parallel_rank": 2, "sequential_rank": 3} | settings)


def network(kind, bias=True):
    torch.manual_seed(0)
    return NETWORKS[kind][0](bias).double()


def adapted(kind="linear", bias=True, **settings):
    """Two layers in float64, all factors drawn."""
    adaptation = hydra(**settings).start(Backbone(network(kind, bias), (), ("0", "2")), None, None, None)
    with torch.no_grad():
        for parameter in adaptation.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return adaptation


def inputs(kind):
    return torch.randn(*NETWORKS[kind][1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def merged(adaptation, kind, bias=True):
    """The plain network with W + s (B_p A_p + B_s A_s W) and b + s B_s A_s b, in NumPy."""
    plain, scale = network(kind, bias), adaptation.method.scale
    for name, layer in adaptation.layers.items():
        target = plain.get_submodule(name)
        W = as_matrix(target, target.weight.detach()).numpy()
        update = np.zeros_like(W)
        for branch, (A, B) in layer.hydra.items():
            product = (B.weight.detach().flatten(1) @ A.weight.detach().flatten(1)).numpy()
            update += product if branch == "parallel" else product @ W
            if branch == "sequential" and bias:
                target.bias.data += scale * torch.from_numpy(product @ target.bias.detach().numpy())
        target.weight.data += scale * torch.from_numpy(update).reshape(target.weight.shape)
    return plain


@pytest.mark.parametrize("settings", [{}, {"parallel_rank": 0}, {"sequential_rank": 0}, {"scale": 0.3}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
class TestUpdate:
    def test_the_model_computes_the_merged_weights_and_biases(self, kind, bias, settings):
        adaptation, x = adapted(kind, bias, **settings), inputs(kind)
        with torch.no_grad():
            wanted = merged(adaptation, kind, bias)(x)
            torch.testing.assert_close(adaptation.model(x), wanted, rtol=0, atol=1e-11)
            assert (wanted - network(kind, bias)(x)).abs().max() > 0.1

    def test_pairs_and_biases_are_those_of_the_update(self, kind, bias, settings):
        adaptation = adapted(kind, bias, **settings)
        plain, whole = network(kind, bias), merged(adaptation, kind, bias)
        for name, update in updates(adaptation).items():
            own, layer = plain.get_submodule(name), whole.get_submodule(name)
            np.testing.assert_allclose(update, (layer.weight - own.weight).detach().flatten(1), rtol=0, atol=1e-12)
            if name in adaptation.biases():
                found = adaptation.biases()[name]
                torch.testing.assert_close(found, (layer.bias - own.bias).detach(), rtol=0, atol=1e-12)
        assert len(adaptation.biases()) == (2 if bias and adaptation.method.sequential_rank else 0)


class TestCut:
    @pytest.mark.parametrize("kind", NETWORKS)
    @pytest.mark.parametrize("rank", [1, 2, 4, 5, 9])
    def test_it_is_the_best_approximation_and_the_bias_goes_with_it(self, kind, rank):
        adaptation, x = adapted(kind), inputs(kind)
        before, biases = updates(adaptation), adaptation.biases()
        with torch.no_grad():
            whole = adaptation.model(x)
            with adaptation.at_rank(rank):
                cut, cut_biases, computed = updates(adaptation), adaptation.biases(), adaptation.model(x)
                torch.testing.assert_close(computed, merged(adaptation, kind)(x), rtol=0, atol=1e-11)
            assert torch.equal(adaptation.model(x), whole)
        for name, update in before.items():
            np.testing.assert_allclose(cut[name], truncated(update, rank), rtol=0, atol=1e-10)
            U = np.linalg.svd(update)[0][:, : min(rank, 5)]
            np.testing.assert_allclose(cut_biases[name], U @ (U.T @ biases[name].numpy()), rtol=0, atol=1e-10)
        assert rank >= 5 or (computed - whole).abs().max() > 1e-2

    def test_an_update_of_a_lower_rank_than_the_branches_keeps_its_bias(self):
        """A_s W is 0 where W is, and B_s A_s b is not."""
        adaptation = adapted(parallel_rank=0)
        layer = adaptation.layers["0"]
        layer.weight.data.zero_()
        bias = adaptation.biases()["0"]
        assert bias.abs().max() > 0.1
        with adaptation.at_rank(3):
            torch.testing.assert_close(adaptation.biases()["0"], bias, rtol=0, atol=0)
        with adaptation.at_rank(1):
            assert not adaptation.biases()["0"].any()


class TestSizes:
    def test_numbers_are_those_of_the_definition(self):
        adaptation = adapted()
        assert adaptation.adapter_parameters() == 2 * (9 + 7) + 2 * 3 * 7 + 2 * (7 + 8) + 2 * 3 * 8
        assert adaptation.ranks() == {"0": 5, "2": 5}

    def test_the_published_size_on_roberta_base(self):
        """0.3M: the outputs of twelve feed-forward blocks, by the defaults."""
        with torch.device("meta"):
            blocks = nn.Sequential(*(nn.Linear(3072, 768) for _ in range(12)))
        backbone, method = Backbone(blocks, (), tuple(map(str, range(12)))), registry.make_method("hydra", {})
        assert method.start(backbone, None, None, None).adapter_parameters() == 331_776
        assert method.notes(backbone, TrainSpec(batches=9), 100) == [
            "184,320 parameters of rank 4 on the inputs of 12 layers and 147,456 of rank 8 on their outputs; an export "
            "is a LoRA of rank 12"
        ]

    def test_it_starts_as_lora_does(self):
        """A within the root of its inputs, which of the sequential branch are the layer's outputs."""
        adaptation = hydra(parallel_rank=4, sequential_rank=4).start(
            Backbone(nn.Sequential(nn.Linear(100, 25)), (), ("0",)), None, None, None
        )
        for (A, B), bound in zip(adaptation.layers["0"].hydra.values(), (0.1, 0.2), strict=True):
            assert 0.9 * bound < A.weight.abs().max() <= bound
            assert not B.weight.any()


@pytest.mark.parametrize("task", ["synthetic", "digits"])
def test_without_the_sequential_branch_it_is_lora(task, tmp_path):
    """From the same draws, bit for bit: on linear layers and on convolutions."""
    runs = [
        start(Subject(name, tmp_path, task=task), batches=12)
        for name in ("hydra[parallel_rank=4,sequential_rank=0,scale=4]", "lora[rank=4,alpha=16]")
    ]
    for run in runs:
        torch.manual_seed(1)
        run.training.run(lambda training: None)
    ours, theirs = ([row["loss"] for row in run.training.history] for run in runs)
    assert ours == theirs
    assert len(set(ours)) > 5
    assert runs[0].training.sizes.parameters() == runs[1].training.sizes.parameters()
    for name, pair in runs[0].adaptation.scaled_pairs().items():
        assert all(map(torch.equal, pair, runs[1].adaptation.scaled_pairs()[name]))


class TestExport:
    @pytest.mark.parametrize("settings", BRANCHES)
    def test_it_is_a_stock_lora_of_both_ranks(self, settings, tmp_path):
        """The file is as large as `stored_bytes` says."""
        run = trained(f"hydra[{settings},learning_rate=1e-2]", tmp_path)
        assert_export_is_stock_lora(run, tmp_path / "export")
        tensors = load_file(tmp_path / "export" / "adapter_model.safetensors")
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == run.adaptation.stored_bytes()

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", NETWORKS)
    def test_stock_peft_computes_it_and_merges_it(self, kind, bias, tmp_path):
        adaptation, x = adapted(kind, bias), inputs(kind)
        adaptation.export(tmp_path)
        loaded = PeftModel.from_pretrained(network(kind, bias), tmp_path).double()
        assert loaded.peft_config["default"].lora_bias is bias
        with torch.no_grad():
            wanted = adaptation.model(x)
            torch.testing.assert_close(loaded(x), wanted, rtol=0, atol=1e-5)  # PEFT loads in float32
            torch.testing.assert_close(loaded.merge_and_unload()(x), wanted, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kind", NETWORKS)
    def test_the_bias_is_needed(self, kind, tmp_path):
        """Without it stock PEFT loads the file as willingly, and computes something else."""
        adaptation, x = adapted(kind), inputs(kind)
        adaptation.export(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({name: 0 * value if name.endswith("bias") else value for name, value in tensors.items()}, file)
        loaded = PeftModel.from_pretrained(network(kind), tmp_path).double()
        with torch.no_grad():
            assert (loaded(x) - adaptation.model(x)).abs().max() > 0.1

    def test_where_some_layers_have_no_bias_stock_peft_warns_and_computes_it(self, tmp_path):
        mixed = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 8, bias=False))
        adaptation = hydra().start(Backbone(copy.deepcopy(mixed), (), ("0", "2")), None, None, None)
        for parameter in adaptation.optimizer.param_groups[0]["params"]:
            parameter.data.normal_()
        adaptation.export(tmp_path)
        with pytest.warns(UserWarning, match="the targeted layer of type Linear has no bias"):
            loaded = PeftModel.from_pretrained(mixed, tmp_path)
        x = inputs("linear").float()
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), adaptation.model(x), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind", NETWORKS)
    def test_within_a_cut(self, kind, tmp_path):
        adaptation, x = adapted(kind), inputs(kind)
        with adaptation.at_rank(2), torch.no_grad():
            adaptation.export(tmp_path)
            wanted, exact = adaptation.model(x), singular_values(updates(adaptation), 2)
        loaded = PeftModel.from_pretrained(network(kind), tmp_path).double()
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), wanted, rtol=0, atol=1e-5)
        for name, values in type(adaptation.method).singular_values(tmp_path).items():
            np.testing.assert_allclose(values, exact[name], rtol=1e-5)  # and no more than two

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # of layers of both kinds
    def test_of_every_kind_of_layer_after_training(self, tmp_path):
        training = method_training(hydra(), KINDS)
        plain = copy.deepcopy(training.adaptation.model)
        training.run(lambda training: None)
        training.adaptation.export(tmp_path)
        for name in KINDS:
            layer = plain.get_submodule(name)
            layer._forward_hooks.clear()
            del layer.hydra
        loaded = PeftModel.from_pretrained(plain, tmp_path).eval().double()
        images = training.encoded.inputs["images"]
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), training.adaptation.model(images), rtol=0, atol=1e-6)


def test_advice_is_a_lora_of_both_ranks():
    form = hydra(scale=0.5).peft_form({"a": 5, "b": 5})
    assert (form.method, form.parameters["rank"], form.parameters["rank_pattern"]) == ("lora", 5, {})
    assert form.config["lora_alpha"] / form.config["r"] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("parallel_rank=0,sequential_rank=0", "parallel_rank = 0 and sequential_rank = 0 leave no branch"),
        (
            "parallel_rank=9,sequential_rank=8",
            "parallel_rank + sequential_rank = 17 is above the smaller side of layer",
        ),
        ("sequential_rank=-1", "hydra.sequential_rank = -1 is not allowed"),
        ("scale=0", "hydra.scale = 0"),
        ("optimizer=galore", "Methods with 'optimizer': full."),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"hydra[{settings}]", message, tmp_path, capsys, "--batches", "6")


def test_what_does_not_fit_a_backbone_is_a_reason():
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    assert "groups" in hydra(sequential_rank=1).unsupported(Backbone(grouped, (), ("0",)))
    assert "no linear or convolution layer" in hydra().unsupported(Backbone(nn.Sequential(nn.LayerNorm(2)), (), ()))
