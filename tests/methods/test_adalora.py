"""AdaLoRA: its schedule, its penalty, its masks, and what is left of it at the end."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from harness import registry
from harness.cli import main
from harness.contracts.subject import Started, Subject, start
from harness.errors import InputError
from harness.method import Backbone
from harness.run import checkpoint
from harness.run.streams import TrainingData
from harness.spec import TrainSpec
from methods.adalora import ADAPTER, AdaLora, AdaLoraAdaptation

NUM_LAYERS = 12  # of the synthetic task


def started(settings: str, batches: int = 20) -> Started:
    return start(Subject(f"adalora[{settings}]", Path(), batches=batches))


def adaptation_of(run: Started) -> AdaLoraAdaptation:
    assert isinstance(run.adaptation, AdaLoraAdaptation)
    return run.adaptation


def singular_values(run: Started) -> dict[str, Tensor]:
    return {name: layer.lora_E[ADAPTER].detach() for name, layer in adaptation_of(run).layers.items()}


def convolutions(groups: int = 1, dilation: int = 1) -> Backbone:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups),
        nn.Conv2d(6, 8, (3, 1), dilation=dilation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.Linear(8, 2),
    )
    return Backbone(module, head=("5",), layers=("0", "1", "4"))


def trained_convolutions(dilation: int = 1, updates: int = 12) -> AdaLoraAdaptation:
    """A few updates by hand, on images that stay the same."""
    backbone = convolutions(dilation=dilation)
    method = AdaLora(init_rank=4, target_rank=1, tfinal=3)
    adaptation = method.start(backbone, TrainSpec(batches=updates), TrainingData(8, 8, 0), torch.Generator())
    assert isinstance(adaptation, AdaLoraAdaptation)
    images, labels = torch.randn(8, 4, 9, 9), torch.arange(8) % 2
    for index in range(updates):
        nn.functional.cross_entropy(adaptation.model(images), labels).backward()
        penalty = adaptation.penalty()
        assert penalty is not None
        penalty.backward()
        adaptation.optimizer.step()
        adaptation.after_step(SimpleNamespace(index=index, resized=lambda: None))
        adaptation.optimizer.zero_grad()
    return adaptation


def test_the_phases_of_the_schedule():
    run = started("init_rank=6,target_rank=2,tinit=3,tfinal=5,deltaT=4")
    run.training.run(lambda training: None)
    totals = [row.get("rank") for row in run.training.history]
    allocations = [update + 1 for update, total in enumerate(totals) if total is not None]
    assert allocations == [4, 8, 12, 15]  # multiples of 4 after the 3rd update, and the end of the descent
    cubic = [int((6 - 2) * NUM_LAYERS * (1 - (update - 3) / (15 - 3)) ** 3 + 2 * NUM_LAYERS) for update in allocations]
    assert [totals[update - 1] for update in allocations] == cubic
    assert cubic[-1] == 2 * NUM_LAYERS


@pytest.mark.parametrize("tfinal", ["0", "6"])
def test_what_is_left_is_exactly_the_budget(tfinal):
    run = started(f"init_rank=6,target_rank=2,tfinal={tfinal}")
    start_numbers = run.training.sizes.parameters()
    run.training.run(lambda training: None)
    ranks, count = run.adaptation.ranks(), run.training.sizes.parameters()
    assert sum(ranks.values()) == 2 * NUM_LAYERS
    assert len(set(ranks.values())) > 1, "every layer has the same rank: nothing was allocated"
    assert {name: int(E.count_nonzero()) for name, E in singular_values(run).items()} == ranks
    assert count.adapter_final == sum(rank * (sum(run.before.shape(name)) + 1) for name, rank in ranks.items())
    assert count.adapter_initial == count.adapter_peak == start_numbers.adapter_final > count.adapter_final


def test_masks_hold_after_the_last_allocation():
    run = started("init_rank=6,target_rank=2,tfinal=10")
    for _ in range(10):
        run.training.update()
    masked = {name: E == 0 for name, E in singular_values(run).items()}
    assert sum(int(mask.sum()) for mask in masked.values()) == 4 * NUM_LAYERS
    for _ in range(10):
        run.training.update()
        for name, E in singular_values(run).items():
            assert torch.equal(E == 0, masked[name])


def test_the_penalty_is_peft_s():
    run = started("orthogonality=0.3")
    run.training.update()
    tuner = adaptation_of(run).tuner
    expected, found = SimpleNamespace(loss=torch.zeros(())), adaptation_of(run).penalty()
    tuner.model.forward = lambda: expected  # PEFT adds its own to whatever the model returns as its loss
    tuner.peft_config[ADAPTER].orth_reg_weight = 0.3
    tuner.forward()
    assert found is not None
    torch.testing.assert_close(found, expected.loss)
    assert found.item() > 0.1


def test_the_penalty_trains_and_is_in_no_loss():
    batch = tuple(range(8))
    losses, distances = [], []
    for weight in ("0.0", "5.0"):
        run = started(f"orthogonality={weight},learning_rate=1e-2")
        run.adaptation.model.eval()
        losses.append(run.training.backward(batch).item())
        run.adaptation.optimizer.zero_grad()
        labelled = run.task.collate(run.training.encoded, batch, None)
        with torch.no_grad():
            own = run.adaptation.model(**labelled.inputs, labels=labelled.labels).loss.item()
        assert own == pytest.approx(losses[-1], rel=1e-6)
        run.training.run(lambda training: None)
        adaptation_of(run).orthogonality = 1.0
        distance = adaptation_of(run).penalty()
        assert distance is not None
        distances.append(distance.item())
    assert losses[0] == losses[1]
    assert distances[1] < 0.7 * distances[0]
    assert adaptation_of(started("orthogonality=0")).penalty() is None


def test_the_loop_does_what_peft_asks_of_its_user():
    """The same run with PEFT's own objects: its forward adds the penalty to the loss of a model that has labels."""
    run = started("init_rank=6,target_rank=2,tinit=2,tfinal=4,deltaT=3,orthogonality=0.5,dropout=0.0", batches=12)
    model = copy.deepcopy(run.before.module)
    config = AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=32, tinit=2, tfinal=4, deltaT=3, total_step=12, orth_reg_weight=0.5,
        target_modules=list(run.before.layers), modules_to_save=list(run.before.head),
    )  # fmt: skip
    bare = get_peft_model(model, config)
    bare.load_state_dict(run.adaptation.model.state_dict())
    bare.eval(), run.adaptation.model.eval()  # without dropout, neither draws random numbers
    optimizer = torch.optim.AdamW([p for p in bare.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    data = TrainingData(run.training.data.size, 8, 0)
    for index in range(12):
        batch = run.task.collate(run.training.encoded, data.draw("all"), None)
        bare.base_model(**batch.inputs, labels=batch.labels).loss.backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        bare.base_model.update_and_allocate(index + 1)
        optimizer.zero_grad()
    run.training.run(lambda training: None)
    assert adaptation_of(run).config.rank_pattern == bare.peft_config[ADAPTER].rank_pattern
    for (name, value), (_, other) in zip(
        run.adaptation.model.state_dict().items(), bare.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(value, other, msg=lambda text, name=name: f"{name}: {text}")


def test_a_resume_keeps_the_averages_and_the_pattern(tmp_path):
    """The contract compares whole runs; here, what an allocation after the resume depends on."""
    run, resumed = (started("init_rank=6,target_rank=2,deltaT=5") for _ in range(2))
    for _ in range(7):
        run.training.update()
    checkpoint.save(tmp_path, 0, run.training.state_dict())
    state = checkpoint.load_newest(tmp_path).state
    assert state is not None
    resumed.training.load_state_dict(state)
    for name in ("exp_avg_ipt", "exp_avg_unc"):
        kept, found = (getattr(adaptation_of(r).tuner.rankallocator, name) for r in (run, resumed))
        assert kept.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in kept.items())
        assert any(value.abs().sum() > 0 for value in kept.values())
    for r in (run, resumed):
        torch.manual_seed(1)  # dropout
        r.training.run(lambda training: None)
    assert resumed.adaptation.ranks() == run.adaptation.ranks()


def test_convolutions():
    adaptation = trained_convolutions()
    ranks = adaptation.ranks()
    assert sum(ranks.values()) == 3
    sizes = {"0": 6 + 4 * 9 + 1, "1": 8 + 6 * 3 + 1, "4": 8 + 8 + 1}
    assert adaptation.adapter_parameters() == sum(rank * sizes[name] for name, rank in ranks.items())


def test_grouped_convolutions_are_a_reason():
    reason = AdaLora(init_rank=4, target_rank=1).unsupported(convolutions(groups=2))
    assert reason == "layer '0' is a convolution in 2 groups, which PEFT's AdaLoRA cannot adapt"


def test_the_export_is_a_stock_adapter_at_the_final_ranks(tmp_path):
    adaptation = trained_convolutions()
    images = torch.randn(5, 4, 9, 9)
    expected = adaptation.model.eval()(images)
    adaptation.export(tmp_path)
    live = {name: rank for name, rank in adaptation.ranks().items() if rank}
    assert len(live) < 3, "the test should cover a layer that lost all of its triplets"
    loaded = PeftModel.from_pretrained(convolutions().module, tmp_path).eval()
    assert loaded.peft_config[ADAPTER].peft_type == "LORA"
    stored = {name: len(m.lora_A[ADAPTER].weight) for name, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert {name.removeprefix("base_model.model."): rank for name, rank in stored.items()} == live
    torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-6)
    assert (expected - convolutions().module(images)).abs().max() > 1e-3


def test_the_export_of_a_run(tmp_path):
    run = started("init_rank=6,target_rank=2")
    run.training.run(lambda training: None)
    inputs = run.task.collate(run.training.encoded, range(8), None).inputs
    run.adaptation.export(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(run.before.module), tmp_path).eval()
    with torch.no_grad():
        expected = run.adaptation.model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-6)


def test_a_dilated_convolution_trains_but_stock_lora_would_not_follow_it(tmp_path):
    with pytest.raises(ValueError, match=r"'1': stock LoRA has neither dilation = \(2, 2\)"):
        trained_convolutions(dilation=2).export(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("updates", "expected"), [(1000, (100, 500, 1)), (24, (2, 12, 1)), (5000, (500, 2500, 5)), (3, (0, 2, 1))]
)
def test_shares_of_the_run(updates, expected):
    if updates == 3:
        with pytest.raises(InputError, match="0 and 2 of 3 updates"):
            AdaLora().schedule(updates)
    else:
        assert AdaLora().schedule(updates) == expected


def test_absolute_updates():
    assert AdaLora(tinit=800, tfinal=3500, deltaT=10).schedule(6700) == (800, 3500, 10)
    assert AdaLora(tinit=0, tfinal=0, deltaT=1).schedule(2) == (0, 0, 1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"init_rank": 8}, "adalora: init_rank = 8 should be above target_rank = 8"),
        ({"init_rank": 4, "target_rank": 6}, "init_rank = 4 should be above target_rank = 6"),
        ({"tinit": 1.5}, "tinit = 1.5 should be a share of the updates below 1, or a whole number of them"),
        ({"deltaT": 0}, "adalora.deltaT = 0 is not allowed: it should be greater than 0"),
        ({"tfinal": -1}, "adalora.tfinal = -1 is not allowed: it should be greater than or equal to 0"),
        ({"init_ranks": 3}, "Did you mean 'init_rank'?"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(InputError) as error:
        registry.make_method("adalora", parameters)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tinit", [0.5, 60])
def test_a_schedule_that_does_not_fit_is_found_before_anything_runs(tinit):
    method = registry.make_method("adalora", {"tinit": tinit, "tfinal": 60})
    with pytest.raises(
        InputError, match=r"tfinal = 60 are (50|60) and 60 of 100 updates: their sum should be below 100"
    ):
        method.notes(convolutions(), TrainSpec(batches=100), 50)


def test_a_rank_above_a_layer_s_size():
    with pytest.raises(InputError, match="init_rank = 12 is above the smaller side of layer '0': allowed is 1 to 6"):
        AdaLora().unsupported(convolutions())


def test_a_dry_run_says_when_the_ranks_fall_and_what_does_not_fit(tmp_path, capsys):
    options = ["--tasks", "synthetic", "--batches", "100", "--results", str(tmp_path / "results")]
    assert main(["run", "--methods", "adalora", *options, "--dry-run"]) == 0
    assert "adalora on synthetic: ranks fall from update 11 to 50 of 100, every 1" in capsys.readouterr().out
    for dry in (["--dry-run"], []):
        assert main(["run", "--methods", "adalora[tfinal=100]", *options, *dry]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: tinit = 0.1 and tfinal = 100 are 10 and 100 of 100 updates")
        assert said.count("\n") == 1
        assert not (tmp_path / "results").exists()
