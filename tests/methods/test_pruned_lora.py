"""A LoRA pruned once: which components stay, that they are removed for good, exact resume, export."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from harness import registry
from harness.cli import main
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.errors import InputError
from harness.method import Backbone, Finished
from tests.support.refusals import assert_refused

COMPONENTS = 12 * 4  # of rank 4 on the synthetic task


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize(
    "settings",
    [
        "selection=magnitude,keep=0.2",
        "selection=random,components=7,first_rows=all",
        "selection=sensitivity,keep=0.2",
        "selection=random,components=7,prune_at=0",
    ],
)
def test_contracts(settings, contract, tmp_path):
    """With components so few that some layers have none left."""
    contract(Subject(f"pruned_lora[rank=4,{settings}]", tmp_path))


def trained(tmp_path: Path, settings: str, seed: int = 0, updates: int = 24):
    started = start(Subject(f"pruned_lora[rank=4,{settings}]", tmp_path), seed=seed, batches=24)
    for _ in range(updates):
        started.training.update()
    started.training.fetch()
    return started


def pairs(started):
    return {name: (B.clone(), A.clone()) for name, (B, A) in started.adaptation.scaled_pairs().items()}


def before_pruning(started) -> dict:
    """The pairs between the optimizer's step and the method's hook after it, of the next update, which prunes."""
    after_step, seen = started.adaptation.after_step, {}

    def watched(step):
        seen.update(pairs(started))
        return after_step(step)

    started.adaptation.after_step = watched
    started.training.update()
    return seen


def singular(B, A):
    """U, S, Vh of B A, the slow way, in float64."""
    return torch.linalg.svd(B.flatten(1).double() @ A.flatten(1).double(), full_matrices=False)


def assert_kept(found, before, kept) -> None:
    """The updates are the parts of those `before` that the singular components `kept`, (layer, number), make up."""
    for name, (B, A) in found.items():
        U, S, Vh = singular(*before[name])
        own = [i for layer, i in kept if layer == name]
        assert A.shape[0] == len(own)
        expected = (U[:, own] * S[own]) @ Vh[own]
        torch.testing.assert_close(
            B.flatten(1).double() @ A.flatten(1).double(), expected, rtol=0, atol=1e-6 * max(1.0, float(S[0]))
        )


def test_magnitude_keeps_the_largest_singular_values_of_all_layers(tmp_path):
    started = trained(tmp_path, "components=10,prune_at=0.5", updates=11)
    before = before_pruning(started)
    values = {(name, i): float(singular(*pair)[1][i]) for name, pair in before.items() for i in range(4)}
    assert sum(started.adaptation.ranks().values()) == 10
    assert_kept(pairs(started), before, sorted(values, key=lambda key: -values[key])[:10])


def test_random_keeps_singular_components_too(tmp_path):
    started = trained(tmp_path, "selection=random,keep=0.5,prune_at=0.5", updates=11)
    names, drawn = list(started.adaptation.layers), started.adaptation.drawn.tolist()
    before = before_pruning(started)
    assert_kept(pairs(started), before, [(names[position // 4], position % 4) for position in drawn])


def test_what_stays_keeps_its_place_in_the_optimizer(tmp_path):
    """Moments follow, so that the loss goes on falling, and what is gone has none."""
    started = trained(tmp_path, "selection=random,keep=0.5,prune_at=0.5")
    state = started.adaptation.optimizer.state
    for name, rank in started.adaptation.ranks().items():
        layer = started.adaptation.layers[name]
        for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            assert state[weight]["exp_avg_sq"].shape == state[weight]["exp_avg"].shape == weight.shape
            assert rank == 0 or (state[weight]["exp_avg_sq"] > 0).all()
            assert rank == 0 or state[weight]["step"] == 24


def test_random_depends_on_the_seed_alone(tmp_path):
    one, two, other = (
        trained(tmp_path, f"selection=random,components=9{more}", seed).adaptation.ranks()
        for seed, more in ((0, ""), (0, ",learning_rate=1e-2"), (1, ""))
    )
    assert one == two != other
    assert sum(one.values()) == sum(other.values()) == 9


def test_it_prunes_once_and_then_draws_from_all_rows(tmp_path):
    started = trained(tmp_path, "keep=0.25,prune_at=0.5")
    rows = [row["update"] for row in started.training.history if "rank" in row]
    assert rows == [11]
    assert started.training.data.drawn == {"all": 12, "lower": 12, "upper": 0}
    count = started.training.sizes.parameters()
    assert count.adapter_final < count.adapter_peak == count.adapter_initial
    ranks = started.adaptation.ranks()
    assert sum(ranks.values()) == COMPONENTS / 4
    assert count.adapter_final == sum(rank * sum(started.before.shape(name)) for name, rank in ranks.items())


def test_a_layer_without_components_is_the_base_layer(tmp_path):
    started = trained(tmp_path, "components=1")
    (live,) = [name for name, rank in started.adaptation.ranks().items() if rank]
    for name, layer in started.adaptation.layers.items():
        x = torch.randn(3, layer.in_features)
        assert torch.equal(layer(x), layer.base_layer(x)) == (name != live)


def test_export_is_a_stock_lora_at_these_ranks(tmp_path):
    started = trained(tmp_path, "keep=0.2")
    started.adaptation.export(tmp_path / "export")
    loaded = PeftModel.from_pretrained(started.before.module, str(tmp_path / "export")).eval()
    batch = started.task.collate(started.training.encoded, range(8), None)
    with torch.no_grad():
        found, wanted = loaded(**batch.inputs).logits, started.adaptation.model.eval()(**batch.inputs).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@dataclass
class FakeStep:
    used: int
    index: int = 0
    budget: int = 10


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), (7, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1)), (2, 3, 5, 5)),
}


def adapted(network, settings):
    """A network of two layers with random pairs, whose columns have nothing to do with their singular vectors."""
    torch.manual_seed(0)
    backbone = Backbone(NETWORKS[network][0](), (), ("0", "2"))
    method = registry.make_method("pruned_lora", {"rank": 3, "components": 3, "prune_at": 0.8} | settings)
    adaptation = method.start(backbone, None, None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in adaptation.layers.values():
            for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                weight.normal_()
    return adaptation


def rotated(adaptation) -> None:
    """Another basis of the same updates: B R and R^-1 A."""
    with torch.no_grad():
        for seed, layer in enumerate(adaptation.layers.values()):
            R = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)) + 2 * torch.eye(3)
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            B.copy_(torch.tensordot(B, R, dims=([1], [0])).movedim(-1, 1))
            A.copy_(torch.tensordot(torch.linalg.inv(R), A, dims=1))


def batches(network):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*NETWORKS[network][1], generator=generator) for _ in range(8)]


def played(adaptation, inputs) -> None:
    """The hooks of 8 updates that leave the weights as they are until the pruning."""
    for used, x in enumerate(inputs, start=1):
        adaptation.optimizer.zero_grad()
        adaptation.model(x).sin().square().mean().backward()
        adaptation.before_step(FakeStep(used))
        adaptation.after_step(FakeStep(used))


def updates(adaptation):
    return {name: B.flatten(1) @ A.flatten(1) for name, (B, A) in adaptation.scaled_pairs().items()}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("selection", ["magnitude", "sensitivity"])
def test_the_basis_of_the_pairs_does_not_matter(selection, network):
    """Of B R and R^-1 A, which are the same update, the same part stays."""
    one, other = (adapted(network, {"selection": selection}) for _ in range(2))
    rotated(other)
    before = updates(one)
    for name, update in updates(other).items():
        torch.testing.assert_close(update, before[name], rtol=1e-4, atol=1e-4)
    for adaptation in (one, other):
        played(adaptation, batches(network))
        assert sum(adaptation.ranks().values()) == 3
    assert one.ranks() == other.ranks()
    for name, update in updates(other).items():
        torch.testing.assert_close(update, updates(one)[name], rtol=1e-3, atol=1e-3)
        assert (update - before[name]).norm() > 0.1


@pytest.mark.parametrize("network", NETWORKS)
def test_sensitivity_keeps_what_costs_most_to_remove(network):
    """Against the derivative of the loss as a component is taken out, by the last half of the batches before."""
    adaptation = adapted(network, {"selection": "sensitivity"})
    before, inputs = pairs_of(adaptation), batches(network)
    costs = {}
    for name, pair in before.items():
        U, S, Vh = singular(*pair)
        base = adaptation.layers[name].get_base_layer()
        for i in range(3):
            part = (S[i] * torch.outer(U[:, i], Vh[i])).float().view_as(base.weight)
            costs[name, i] = sum(derivative(adaptation, base, -part, x) for x in inputs[4:])
    kept = sorted(costs, key=lambda key: -costs[key])[:3]
    assert min(costs.values()) < 0 < max(costs.values()), "signs have to matter"
    played(adaptation, inputs)
    assert_kept(adaptation.scaled_pairs(), before, kept)


def pairs_of(adaptation):
    return {name: (B.clone(), A.clone()) for name, (B, A) in adaptation.scaled_pairs().items()}


def derivative(adaptation, base, direction, x) -> float:
    """Of the loss at x, as the base weight moves in this direction."""
    base.weight.requires_grad_(True)
    loss = adaptation.model(x).sin().square().mean()
    (gradient,) = torch.autograd.grad(loss, base.weight)
    base.weight.requires_grad_(False)
    return float((gradient * direction).sum())


def test_components_are_followed_back_through_the_window():
    """B and A move in it: what counts is the mean effect of (B_t q)(r^T A_t), where B q and r^T A are a component in
    the end."""
    adaptation = adapted("linear", {"selection": "sensitivity", "window": 1.0})
    optimizer = torch.optim.SGD([p for p in adaptation.model.parameters() if p.requires_grad], lr=0.3)
    adaptation.optimizer, history = optimizer, {name: [] for name in adaptation.layers}
    for used, x in enumerate(batches("linear"), start=1):
        optimizer.zero_grad()
        adaptation.model(x).sin().square().mean().backward()
        adaptation.before_step(FakeStep(used))
        for name, layer in adaptation.layers.items():
            B = layer.lora_B["default"].weight
            history[name].append((B.detach().clone(), B.grad.clone()))
        optimizer.step()
        before = pairs_of(adaptation)
        adaptation.after_step(FakeStep(used))
    costs = {}
    for name, (B, A) in before.items():
        U, S, Vh = singular(B, A)
        q, r = torch.linalg.pinv(B.double()) @ U[:, :3], Vh[:3] @ torch.linalg.pinv(A.double())
        assert_close = torch.testing.assert_close
        assert_close(B.double() @ q @ S[:3].diag() @ r @ A.double(), B.double() @ A.double(), rtol=0, atol=1e-6)
        for i in range(3):
            # The derivative in B of (B_t q_i) s_i (r_i A_t) alone is that of B_t times r_i.
            effects = [(Bt.double() @ q[:, i]) @ (Gt.double() @ r[i]) * S[i] for Bt, Gt in history[name]]
            costs[name, i] = -float(sum(effects))
    assert_kept(adaptation.scaled_pairs(), before, sorted(costs, key=lambda key: -costs[key])[:3])


def test_sensitivity_trains_as_magnitude_does_until_it_prunes(tmp_path):
    one, other = (trained(tmp_path, f"selection={name},prune_at=0.5", updates=11) for name in ("magnitude", "random"))
    third = trained(tmp_path, "selection=sensitivity,prune_at=0.5", updates=11)
    for name, (B, A) in pairs(one).items():
        for also in (other, third):
            assert torch.equal(B, pairs(also)[name][0])
            assert torch.equal(A, pairs(also)[name][1])


def test_a_random_placement_from_the_start(tmp_path):
    """No component is trained that does not stay, and all rows are drawn from; the placement is that of a late one."""
    started = trained(tmp_path, "selection=random,components=9,prune_at=0")
    count = started.training.sizes.parameters()
    assert count.adapter_final == count.adapter_peak == count.adapter_initial
    assert started.training.data.drawn == {"all": 24, "lower": 0, "upper": 0}
    assert started.adaptation.ranks() == trained(tmp_path, "selection=random,components=9").adaptation.ranks()
    assert not any("rank" in row for row in started.training.history)


def test_convolutions():
    torch.manual_seed(0)
    backbone = Backbone(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)), (), ("0", "2"))
    method = registry.make_method("pruned_lora", {"rank": 2, "components": 2})
    adaptation = method.start(backbone, None, None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in adaptation.layers.values():
            layer.lora_B["default"].weight.normal_()
        layer.lora_B["default"].weight.mul_(1e-3)  # the last layer's
    adaptation.after_step(FakeStep(used=5))
    assert adaptation.ranks() == {"0": 2, "2": 0}
    assert adaptation.model(torch.randn(1, 3, 5, 5)).shape == (1, 2, 5, 5)
    assert adaptation.adapter_parameters() == 2 * (4 + 27)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("components=3,keep=0.5", "components = 3 and keep = 0.5 are both set; give one of them"),
        ("components=0", "pruned_lora.components = 0 is not allowed"),
        ("keep=0", "pruned_lora.keep = 0 is not allowed"),
        ("prune_at=1", "pruned_lora.prune_at = 1 is not allowed"),
        ("selection=magnitud", "pruned_lora.selection = 'magnitud' is not allowed: it should be 'magnitude', 'rando"),
        (
            "prune_at=0",
            "prune_at = 0 with selection = magnitude: nothing is trained yet to choose by; set selection",
        ),
        ("prune_at=0,selection=sensitivity", "prune_at = 0 with selection = sensitivity: nothing is trained yet"),
        ("window=0", "pruned_lora.window = 0 is not allowed"),
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("components=1000", "components = 1000 is above the 96 that there are"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    assert_refused(f"pruned_lora[{settings}]", message, tmp_path, capsys)


def test_a_dry_run_says_how_many_stay(tmp_path, capsys):
    options = ["--tasks", "synthetic", "--batches", "9", "--results", str(tmp_path), "--dry-run"]
    assert main(["run", "--methods", "pruned_lora", *options]) == 0
    assert "29 of 96 components are left after batch 3 of 9" in capsys.readouterr().out
    assert main(["run", "--methods", "pruned_lora[selection=random,prune_at=0]", *options]) == 0
    assert "29 of 96 components are there from the start" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ({"0": 2, "1": 1}, None),
        ({"0": 4, "1": 1}, "debora has 5 components, and rank 4 can have 1 to 4"),
        ({"0": 0}, "debora has 0 components, and rank 4 can have 1 to 4"),
    ],
)
def test_as_many_components_stay_as_a_run_that_it_waited_for_has(ranks, reason):
    backbone = Backbone(nn.Sequential(nn.Linear(4, 4)), (), ("0",))
    method = registry.make_method("pruned_lora", {"rank": 4, "size_of": "debora"})
    inherited = method.inherit(backbone, {"size_of": Finished(ranks, None)})
    assert inherited.num_kept(1) == sum(ranks.values())
    assert inherited.unsupported(backbone) == reason
    with pytest.raises(InputError, match="size_of is filled in when a run starts"):
        method.num_kept(1)


def test_too_many_components_are_an_input_error():
    backbone = Backbone(nn.Sequential(nn.Linear(4, 4)), (), ("0",))
    with pytest.raises(InputError, match="components = 5 is above the 4"):
        registry.make_method("pruned_lora", {"rank": 4, "components": 5}).unsupported(backbone)
