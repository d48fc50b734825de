"""A LoRA pruned once: which components stay, that they are removed for good, exact resume, export."""

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

COMPONENTS = 12 * 4  # of rank 4 on the synthetic task


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("settings", ["selection=magnitude,keep=0.2", "selection=random,components=7,first_rows=all"])
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


def sizes(started):
    """||a|| ||b|| of all components, layer by layer, the slow way."""
    found = {}
    for name, (B, A) in pairs(started).items():
        for i in range(A.shape[0]):
            found[name, i] = float(torch.linalg.matrix_norm(torch.outer(B[:, i], A[i])))
    return found


def look_before_pruning(started, look) -> None:
    """Call `look` between the optimizer's step and the method's hook after it."""
    after_step = started.adaptation.after_step

    def watched(step):
        look()
        return after_step(step)

    started.adaptation.after_step = watched


def test_magnitude_keeps_the_largest_of_all_layers(tmp_path):
    started = trained(tmp_path, "components=10,prune_at=0.5", updates=11)
    before, size = {}, {}

    def look():
        before.update(pairs(started))
        size.update(sizes(started))

    look_before_pruning(started, look)
    started.training.update()
    largest = sorted(size, key=lambda key: -size[key])[:10]
    assert sum(started.adaptation.ranks().values()) == 10
    for name, (B, A) in pairs(started).items():
        kept = [i for i in range(4) if (name, i) in largest]
        assert torch.equal(A, before[name][1][kept])
        assert torch.equal(B, before[name][0][:, kept])


def test_the_optimizer_state_of_what_stays_is_kept(tmp_path):
    started = trained(tmp_path, "selection=random,keep=0.5,prune_at=0.5", updates=11)
    optimizer, layers, seen = started.adaptation.optimizer, started.adaptation.layers, {}
    drawn = set(started.adaptation.drawn.tolist())

    def look():
        for number, (name, layer) in enumerate(layers.items()):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            own = [i for i in range(4) if 4 * number + i in drawn]
            seen[name] = optimizer.state[A]["exp_avg_sq"][own].clone(), optimizer.state[B]["exp_avg"][:, own].clone()

    look_before_pruning(started, look)
    started.training.update()
    assert sum(len(of_A) for of_A, _ in seen.values()) == 24
    for name, (of_A, of_B) in seen.items():
        assert torch.equal(optimizer.state[layers[name].lora_A["default"].weight]["exp_avg_sq"], of_A)
        assert torch.equal(optimizer.state[layers[name].lora_B["default"].weight]["exp_avg"], of_B)


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


class FakeStep:
    index, used, budget = 0, 1, 2


def test_convolutions():
    torch.manual_seed(0)
    backbone = Backbone(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)), (), ("0", "2"))
    method = registry.make_method("pruned_lora", {"rank": 2, "components": 2})
    adaptation = method.start(backbone, None, None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in adaptation.layers.values():
            layer.lora_B["default"].weight.normal_()
        layer.lora_B["default"].weight.mul_(1e-3)  # the last layer's
    adaptation.after_step(FakeStep())
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
        ("selection=magnitud", "pruned_lora.selection = 'magnitud' is not allowed: it should be 'magnitude' or 'rand"),
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("components=1000", "components = 1000 is above the 96 that there are"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    results = tmp_path / "results"
    assert (
        main(["run", "--tasks", "synthetic", "--methods", f"pruned_lora[{settings}]", "--results", str(results)]) == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not results.exists()


def test_a_dry_run_says_how_many_stay(tmp_path, capsys):
    options = ["--tasks", "synthetic", "--batches", "9", "--results", str(tmp_path), "--dry-run"]
    assert main(["run", "--methods", "pruned_lora", *options]) == 0
    assert "29 of 96 components are left after batch 3 of 9" in capsys.readouterr().out


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
