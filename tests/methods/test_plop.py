"""PLoP: normalised feature norms, the choice of module types, and a LoRA in the chosen layers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness import registry
from harness.cli import main
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.contracts.subject import method_of
from harness.errors import InputError
from harness.method import Backbone, as_matrix
from harness.run import checkpoint
from harness.spec import Place, TrainSpec
from methods.plop import RANDOM_ROWS, feature_norms, module_type
from tests.support import tiny

TYPES = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
SMALL = "plop[rank=2,types=2,batches=2]"


def trained(name: str, batches: int = 12, updates: int | None = None):
    run = start(Subject(name, Path(), batches=batches))
    while run.training.used < batches and (updates is None or run.training.index < updates):
        run.training.update()
    run.training.fetch()
    return run


def chosen(run) -> set[str]:
    return {module_type(name) for name, rank in run.adaptation.ranks().items() if rank}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Place:
    """CIFAR-10 in its published layout and a ResNet of 32 pixels."""
    folder = tiny.write_all(tmp_path_factory.mktemp("images"))
    return Place(data_root=str(folder / "data"), model=str(folder / "resnet"))


CIFAR = "cifar10[image_size=32]"


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_contracts(kind, contract, tmp_path, images):
    name = "plop[rank=2,types=1,choice=inverse,dropout=0.1,batches=2,learning_rate=3e-3]"
    subject = Subject(name, tmp_path, batches=8)
    contract(replace(subject, task=CIFAR, place=images) if kind == "convolutions" else subject)


@dataclass
class FakeStep:
    """Passes that put the given inputs through the model."""

    model: nn.Module
    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def backward(self, batch) -> None:
        self.model(**batch) if isinstance(batch, dict) else self.model(batch)


def norms(model: nn.Module, batches, names=None) -> dict[str, float]:
    layers = {name: model.get_submodule(name) for name in names or ("0",)}
    return feature_norms(FakeStep(model), model, layers, batches)


def gaussian(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYER_KINDS = {
    "linear": (lambda: nn.Linear(24, 10), (500, 24)),
    "transposed": (lambda: Conv1D(10, 24), (500, 24)),
    "convolution": (lambda: nn.Conv2d(6, 10, 2, stride=2), (25, 6, 8, 10)),  # patches that do not overlap: independent
    "rank 1": (lambda: nn.Linear(24, 1), (500, 24)),
}


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("length", [1.0, 30.0])
def test_random_inputs_have_a_norm_of_about_1(kind, length):
    """Within 4 standard errors. With S = W W^T, |W u|^2 has the relative variance 2 tr(S^2) / tr(S)^2, and at most, of
    a Gaussian; |W u| has at most 0.76, that of one dimension."""
    torch.manual_seed(0)
    make, shape = LAYER_KINDS[kind]
    model = nn.Sequential(make())
    W = as_matrix(model[0], model[0].weight).detach().double()
    S = W @ W.T
    spread = min(0.76, math.sqrt(float((S * S).sum() / S.trace() ** 2 / 2)) * 1.1)
    error = spread * math.sqrt(1 / 500 + 1 / RANDOM_ROWS)
    assert norms(model, [gaussian(*shape) * length])["0"] == pytest.approx(1, abs=4 * error)


def test_it_is_the_mean_over_the_definition():
    """Against a loop over single inputs, whose random term is many more directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    batches = [gaussian(7, 5, seed=3) + 1, gaussian(3, 5, seed=4) * 100]
    found = norms(model, batches, ("0", "2"))
    for name in ("0", "2"):
        W = model.get_submodule(name).weight.detach().double()
        values = []
        for rows in batches:
            for row in model[: int(name)](rows).detach().double():
                if row.any():
                    values.append(float((W @ row).norm() / row.norm()))
        drawn = gaussian(200_000, W.shape[1], seed=5).double()
        random = ((drawn @ W.T).norm(dim=1) / drawn.norm(dim=1)).mean()
        assert found[name] == pytest.approx(sum(values) / len(values) / float(random), rel=0.03)


def test_inputs_along_the_weight_s_directions():
    """W = diag(3, 1): e_1 gives 3 over the mean of |W u|, e_2 a third of that; a 0 has no direction."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    one, two = (norms(model, [torch.tensor(rows)])["0"] for rows in ([[5.0, 0.0], [0.0, 0.0]], [[0.0, 0.1]]))
    assert one == pytest.approx(3 * two, rel=1e-6)
    angles = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)[:-1]
    mean = (9 * angles.cos() ** 2 + angles.sin() ** 2).sqrt().mean()
    assert one == pytest.approx(3 / float(mean), rel=0.05)


def test_the_size_of_the_weight_does_not_matter():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(24, 10)), [gaussian(50, 24)]
    batches[0][:, 0] *= 5
    with torch.no_grad():
        model[0].weight[:, 0] *= 5
    before = norms(model, batches)["0"]
    assert before > 1.2
    for factor in (1e-3, 4.0, 1e4):
        with torch.no_grad():
            model[0].weight.mul_(factor)
        assert norms(model, batches)["0"] == pytest.approx(before, rel=1e-5)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.linear(self.embedding(input_ids))


def test_padding_does_not_matter():
    torch.manual_seed(0)
    model, ids = Reader(), [[3, 4, 5], [6, 7]]

    def batch(rows, length):
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {"input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]), "attention_mask": mask}

    alone = norms(model, [batch([row], len(row)) for row in ids], ("linear",))
    together = norms(model, [batch(ids, 30)], ("linear",))
    assert together["linear"] == pytest.approx(alone["linear"], rel=1e-6)
    ones = batch(ids, 30) | {"attention_mask": torch.ones(2, 30, dtype=torch.int64)}
    assert norms(model, [ones], ("linear",))["linear"] != pytest.approx(alone["linear"], rel=1e-3)


@pytest.mark.parametrize("without", ["inputs", "weight"])
def test_a_layer_without_a_norm_is_named(without):
    model = nn.Sequential(nn.Linear(3, 2))
    if without == "weight":
        nn.init.zeros_(model[0].weight)
    rows = torch.zeros(4, 3) if without == "inputs" else torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="layer '0' gets no input but 0, or its weight is 0"):
        norms(model, [rows])


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("bert.encoder.layer.11.attention.output.dense", "attention.output.dense"),
        ("bert.encoder.layer.11.output.dense", "output.dense"),
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"),
        ("layer1.0.downsample.0", "downsample"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0", "attn2.to_out"),
        ("embedder.convolution", "embedder.convolution"),
        ("2", "2"),
        ("0.2", "0.2"),
    ],
)
def test_module_types(layer, kind):
    assert module_type(layer) == kind


NORMS = {"a.0.x": 5.0, "a.0.y": 1.0, "a.0.z": 2.5, "a.1.x": 1.0, "a.1.y": 2.0, "a.1.z": 2.5}  # means 3, 1.5, 2.5


def test_the_types_of_the_lowest_mean_are_chosen_and_their_inverse():
    assert method_of("plop[types=1]").chosen(NORMS) == ("a.0.y", "a.1.y")
    assert method_of("plop[types=2]").chosen(NORMS) == ("a.0.y", "a.0.z", "a.1.y", "a.1.z")
    assert method_of("plop[types=1,choice=inverse]").chosen(NORMS) == ("a.0.x", "a.1.x")
    equal = dict.fromkeys(NORMS, 1.0)
    for number in (1, 2):
        lowest = method_of(f"plop[types={number}]").chosen(equal)
        inverse = method_of(f"plop[types={3 - number},choice=inverse]").chosen(equal)
        assert {*lowest, *inverse} == {*NORMS}
        assert not {*lowest} & {*inverse}


def test_a_run_chooses_by_the_norms_of_its_own_inputs():
    """Lowest and inverse complement each other, and the history has what the choice was made by."""
    lowest = trained("plop[rank=2,types=2,batches=2]", updates=1)
    inverse = trained("plop[rank=2,types=4,batches=2,choice=inverse]", updates=1)
    assert chosen(lowest) | chosen(inverse) == set(TYPES)
    assert not chosen(lowest) & chosen(inverse)
    rows = [run.training.history[0] for run in (lowest, inverse)]
    assert rows[0]["feature_norms"] == rows[1]["feature_norms"]
    values = dict(zip(lowest.before.layers, rows[0]["feature_norms"], strict=True))
    means = {kind: sum(v for n, v in values.items() if module_type(n) == kind) for kind in TYPES}
    assert chosen(lowest) == set(sorted(means, key=lambda kind: means[kind])[:2])
    assert rows[0]["rank"] == sum(rows[0]["ranks"]) == sum(lowest.adaptation.ranks().values()) == 2 * 2 * 2
    backbone, seen = lowest.before.module.eval(), {}
    for name in values:
        backbone.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    data = start(Subject(SMALL, Path())).training.data
    with torch.no_grad():
        for _ in range(2):
            backbone(**lowest.task.collate(lowest.training.encoded, data.draw("all"), None).inputs)
    for name, value in values.items():
        W, rows = backbone.get_parameter(f"{name}.weight").detach().double(), torch.cat(seen[name]).double()
        limit = W.norm() / W.shape[1] ** 0.5  # the root mean square of |W u|, a little above its mean
        assert value == pytest.approx(float(((rows @ W.T).norm(dim=1) / rows.norm(dim=1)).mean() / limit), rel=0.06)


def test_chosen_layers_alone_train():
    run = start(Subject(SMALL, Path(), batches=12))
    before = {name: p.detach().clone() for name, p in run.adaptation.model.named_parameters()}
    run.training.run(lambda training: None)
    ranks = run.adaptation.ranks()
    assert list(ranks) == list(run.before.layers)
    assert sorted(ranks.values()) == 8 * [0] + 4 * [2]
    after = dict(run.adaptation.model.named_parameters())
    for name, rank in ranks.items():
        layer = run.adaptation.model.get_submodule(f"base_model.model.{name}")
        assert isinstance(layer, LoraLayer) == (rank > 0)
        assert type(layer) is nn.Linear or rank > 0
        if rank:
            B = f"base_model.model.{name}.lora_B.default.weight"
            assert not torch.equal(before[B], after[B])
    assert {
        name for name in after if "lora_" in name and not any(f".{n}." in name for n, r in ranks.items() if r)
    } == set()


def test_batches_count_and_sizes_follow_from_the_choice():
    run = start(Subject(SMALL, Path(), batches=12))
    run.training.prepare()
    assert run.training.used == run.training.data.drawn["all"] == run.training.schedule_start == 2
    assert all(part.training for part in run.adaptation.model.modules())
    sides = {name: sum(run.before.shape(name)) for name in run.before.layers}
    count, ranks = run.training.sizes.parameters(), run.adaptation.ranks()
    assert count.adapter_initial == 2 * sum(sides.values())
    assert count.adapter_final == sum(rank * sides[name] for name, rank in ranks.items())
    assert count.stored_bytes == 4 * (count.adapter_final + count.head)
    held = {id(p) for group in run.adaptation.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.adaptation.model.parameters() if p.requires_grad}


def test_all_types_are_a_lora():
    """The same start, and on the same batches the same losses, with dropout: the passes before it draw nothing."""
    plop = start(Subject("plop[rank=2,types=6,batches=2,dropout=0.1]", Path(), batches=12))
    plop.training.prepare()
    begun = {name: value.clone() for name, value in plop.adaptation.model.state_dict().items()}
    plop.training.run(lambda training: None)
    lora = start(Subject("lora[rank=2,dropout=0.1]", Path(), batches=10))
    for _ in range(2):
        lora.training.data.draw("all")
    assert begun.keys() == lora.adaptation.model.state_dict().keys()
    for name, value in lora.adaptation.model.state_dict().items():
        assert torch.equal(value, begun[name]), name
    lora.training.run(lambda training: None)
    assert [row["loss"] for row in plop.training.history] == [row["loss"] for row in lora.training.history]
    assert len(plop.training.history) == 10


def test_what_was_removed_leaves_no_trace():
    """The same losses as a LoRA that never had it, from the same values."""
    plop = start(Subject(SMALL, Path(), batches=12))
    plop.training.prepare()
    pattern = ",".join(f'"{name}"={rank}' for name, rank in plop.adaptation.ranks().items())
    lora = start(Subject(f"lora[rank=2,rank_pattern={{{pattern}}}]", Path(), batches=10))
    lora.adaptation.model.load_state_dict(plop.adaptation.model.state_dict())
    for _ in range(2):
        lora.training.data.draw("all")
    for run in (plop, lora):
        torch.manual_seed(1)
        run.training.run(lambda training: None)
    assert [row["loss"] for row in plop.training.history] == [row["loss"] for row in lora.training.history]


def test_a_resumed_run_has_the_choice_from_its_state(tmp_path):
    """Also where its own inputs would choose otherwise."""
    run = trained(SMALL, updates=1)
    checkpoint.save(tmp_path, 1, run.training.state_dict())
    other = start(Subject(SMALL, Path(), batches=12), seed=1)
    other.training.load_state_dict(checkpoint.load_newest(tmp_path).state)
    assert other.adaptation.ranks() == run.adaptation.ranks()
    assert other.training.sizes.parameters() == run.training.sizes.parameters()
    assert other.training.used == 3


def test_a_state_from_before_the_first_update_is_exact(tmp_path):
    """The history has the norms all the same."""
    whole = start(Subject(SMALL, Path(), batches=6))
    whole.training.prepare()
    checkpoint.save(tmp_path, 2, whole.training.state_dict())
    whole.training.run(lambda training: None)
    resumed = start(Subject(SMALL, Path(), batches=6))
    resumed.training.load_state_dict(checkpoint.load_newest(tmp_path).state)
    resumed.training.run(lambda training: None)
    assert whole.training.history == resumed.training.history
    assert len(resumed.training.history[0]["feature_norms"]) == len(whole.before.layers)


@pytest.mark.parametrize("task", ["synthetic", CIFAR])
def test_an_export_is_the_trained_model_in_stock_peft(task, tmp_path, images):
    place = images if task == CIFAR else Place()
    run = start(Subject("plop[rank=2,types=1,batches=2,learning_rate=1e-2]", Path(), task=task, place=place), batches=8)
    run.training.run(lambda training: None)
    run.adaptation.export(tmp_path)
    inputs = run.task.collate(run.training.encoded, range(8), None).inputs
    with torch.no_grad():
        base = run.before.module.eval()(**inputs).logits
        loaded = PeftModel.from_pretrained(run.before.module, tmp_path).eval()
        expected = run.adaptation.model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 1e-3
    found = run.method.singular_values(tmp_path)
    assert {name: len(values) for name, values in found.items()} == {
        n: r for n, r in run.adaptation.ranks().items() if r
    }


def test_peft_form():
    form = method_of("plop[rank=2,alpha=6]").peft_form({"a": 2, "b": 0})
    assert (form.config["r"], form.config["lora_alpha"], form.config["target_modules"]) == (2, 6, "a")


BACKBONE = Backbone(
    nn.ModuleList([nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 8)}) for _ in range(2)]),
    (),
    ("0.x", "0.y", "1.x", "1.y"),
)


def test_what_cannot_be_chosen():
    assert method_of("plop[rank=2,types=2]").unsupported(BACKBONE) is None
    with pytest.raises(InputError, match="types = 3 is above the 2 module types that there are: x, y"):
        method_of("plop[rank=2]").unsupported(BACKBONE)
    one = method_of('plop[rank=2,types=1,target_modules=["x"]]').unsupported(BACKBONE)
    assert one == "all layers are of one module type, 'x': there is nothing to choose"
    with pytest.raises(InputError, match="rank = 5 is above the smaller side"):
        method_of("plop[rank=5,types=1]").unsupported(BACKBONE)
    with pytest.raises(InputError, match=r"plop\.choice = 'highest' is not allowed"):
        registry.make_method("plop", {"choice": "highest"})


@pytest.mark.parametrize("padding", [{"groups": 2}, {"padding_mode": "circular"}, {"padding": "same"}, {"dilation": 2}])
def test_convolutions_whose_inputs_are_no_rows_are_a_reason(padding):
    module = nn.ModuleDict({"x": nn.Conv2d(4, 4, 3, **{"padding": 1} | padding), "y": nn.Conv2d(4, 4, 1)})
    assert "layer 'x' is a convolution with" in method_of("plop[rank=2,types=1]").unsupported(
        Backbone(module, (), ("x", "y"))
    )


def test_the_note_has_the_sizes_that_can_come_out(tmp_path, capsys):
    """And the least budget is told before anything is written."""
    (note,) = method_of("plop[rank=2,types=1,batches=3]").notes(BACKBONE, TrainSpec(batches=4), 99)
    assert note == "LoRA in 1 of 2 module types, 32 to 48 parameters; 3 of 4 batches are read before the first update"
    options = ["--tasks", "synthetic", "--batches", "3", "--results", str(tmp_path / "r"), "--executor", "serial"]
    assert main(["run", "--methods", "plop[rank=2,batches=3]", *options]) == 2
    assert (
        "plop reads batches = 3 before the first update, and the budget is 3: give at least 4"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "r").exists()
