"""What IncreLoRA and TriAdaptLoRA share: the budget of ranks, the growth of factors and moments, the export."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.contracts.subject import method_of
from harness.errors import InputError
from harness.method import Backbone, as_matrix
from harness.spec import TrainSpec
from methods.shared.growing_lora import shared_out
from tests.support.network import KINDS, Network, method_training
from tests.support.refusals import assert_refused
from tests.support.small_lora import assert_export_is_stock_lora, truncated
from tests.support.trained import trained

NAMES = ("increlora", "triadaptlora")
ROOM = 4 + 10 + 8  # ranks of the network's convolution, linear and transposed layer together
LAYERS = 12  # of the synthetic task


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize(
    "name",
    [
        "increlora[components=29,increment=3,advance=false,scale=fixed,tinit=2,deltaT=3]",
        "triadaptlora[components=29,increment=3,growth=exponential,scale=fixed,tinit=2,deltaT=3]",
    ],
)
def test_contracts(name, contract, tmp_path):
    """With other settings than those that every method is tried with."""
    contract(Subject(name, tmp_path))


@dataclass
class RoundStep:
    """The update after which a round is due, of a run of ten."""

    used: int = 5
    budget: int = 10
    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    @property
    def index(self):
        return self.used - 1

    def resized(self):
        pass


def on_network(name, layers=KINDS, batches=10, **settings):
    """A run in float64 on a convolution, a linear and a transposed layer, with entries at random in the cores."""
    training = method_training(registry.make_method(name, settings), layers, batches)
    with torch.no_grad():
        for layer in layers:
            B, A, core = training.adaptation.parts(layer)
            for part in (B, A, core[: training.adaptation.live[layer]]):
                part.normal_()
    return training


def outputs(training):
    images = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        return training.adaptation.model(images)


def updates(adaptation):
    """Each layer's update as a matrix."""
    return {name: (B.flatten(1) @ A.flatten(1)).numpy() for name, (B, A) in adaptation.scaled_pairs().items()}


class TestSharingOut:
    def test_against_one_rank_after_the_other(self):
        rng = np.random.default_rng(0)
        for _ in range(300):
            room = rng.integers(0, 7, rng.integers(1, 6)).tolist()
            order, each = rng.permutation(len(room)).tolist(), int(rng.integers(1, 5))
            total = int(rng.integers(0, 20))
            expected, turns = [0] * len(room), [place for _ in range(20) for place in order for _ in range(each)]
            given = 0
            for place in turns:
                if given < min(total, sum(room)) and expected[place] < room[place]:
                    expected[place] += 1
                    given += 1
            gains = shared_out(order, room, each, total)
            assert gains == expected
            assert sum(gains) == min(total, sum(room))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(("components", "increment"), [(13, 1), (17, 4), (29, 3), (40, 16), (25, 5)])
    def test_a_run_ends_at_its_target_and_never_passes_it(self, name, components, increment, tmp_path):
        """Also where rounds do not fit, which made the source's run go on growing."""
        chosen = f"{name}[components={components},increment={increment},deltaT=2]"
        started = trained(chosen, tmp_path)
        sizes = started.method.sizes(LAYERS, 24)
        trajectory = [(size.batches, size.rank) for size in started.training.sizes.trajectory]
        assert [entry for entry in trajectory if entry[0]] == [entry for entry in sizes.items() if entry[0]]
        assert trajectory[0] == (0, LAYERS)
        assert max(sizes.values()) == list(sizes.values())[-1] == components
        rows = {row["batches"]: row for row in started.training.history if "rank" in row}
        assert {batches: row["rank"] for batches, row in rows.items()} == {b: r for b, r in sizes.items() if b}
        before = [1] * LAYERS
        for row in rows.values():
            assert all(now >= one for now, one in zip(row["ranks"], before, strict=True))
            before = row["ranks"]

    @pytest.mark.parametrize("name", NAMES)
    def test_a_round_goes_to_the_layers_of_the_highest_score(self, name, tmp_path):
        started = trained(f"{name}[components=16,increment=2,tinit=4]", tmp_path)
        before = [1] * LAYERS
        for row in started.training.history:
            if "rank" in row:
                gains = [now - one for now, one in zip(row["ranks"], before, strict=True)]
                grown = [score for score, gain in zip(row["score"], gains, strict=True) if gain]
                left = [score for score, gain in zip(row["score"], gains, strict=True) if not gain]
                assert min(grown) >= max(left)
                before = row["ranks"]

    @pytest.mark.parametrize("name", NAMES)
    def test_the_target_may_be_all_that_there_is_room_for(self, name):
        training = on_network(name, components=ROOM, increment=3, tinit=0, deltaT=1)
        training.run(lambda training: None)
        assert training.adaptation.ranks() == {"convolution": 4, "linear": 10, "transposed": 8}
        assert [len(A) for _, A, _ in map(training.adaptation.parts, KINDS)] == [4, 10, 8]

    @pytest.mark.parametrize("name", NAMES)
    def test_growth_changes_the_result(self, name, tmp_path):
        """Against a run without: the same losses until the first round, other ones once new components have trained."""
        more = "learning_rate=1e-2" + (",advance=false" if name == "increlora" else "")
        chosen = (f"{name}[components={size},tinit=5,deltaT=1,{more}]" for size in (24, LAYERS))
        grown, fixed = (trained(each, tmp_path) for each in chosen)
        losses = [[row["loss"] for row in started.training.history] for started in (grown, fixed)]
        same = [one == other for one, other in zip(*losses, strict=True)]
        assert all(same[:6])
        assert not any(same[8:])
        assert set(fixed.adaptation.ranks().values()) == {1}
        assert sum(grown.adaptation.ranks().values()) == 24


class TestFunction:
    """In float64, for linear layers, kernels and transposed weights."""

    @pytest.mark.parametrize("name", NAMES)
    def test_a_growth_at_a_fixed_scale_leaves_it_as_it_is(self, name):
        more = {"advance": False} if name == "increlora" else {}
        training = on_network(name, components=12, increment=3, scale="fixed", **more)
        before, weights = outputs(training), updates(training.adaptation)
        assert training.adaptation.after_step(RoundStep())["rank"] > 3
        torch.testing.assert_close(outputs(training), before, rtol=0, atol=1e-12)
        for layer, update in updates(training.adaptation).items():
            np.testing.assert_allclose(update, weights[layer], atol=1e-12)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_papers_scale_shrinks_an_update_by_the_share_of_its_ranks(self, name):
        more = {"advance": False} if name == "increlora" else {}
        training = on_network(name, components=12, increment=3, **more)
        weights = updates(training.adaptation)
        training.adaptation.after_step(RoundStep())
        ranks = training.adaptation.ranks()
        assert set(ranks.values()) - {1}
        for layer, update in updates(training.adaptation).items():
            np.testing.assert_allclose(update, weights[layer] / ranks[layer], atol=1e-12)

    @pytest.mark.parametrize("name", NAMES)
    def test_it_is_the_backbones_with_the_updates_added(self, name):
        """And those are what is exported."""
        training = on_network(name, components=12, increment=2, deltaT=2)
        training.run(lambda training: None)
        module = Network().eval().double()
        module.load_state_dict(
            {
                key: training.adaptation.model.state_dict()[_wrapped(key, training.adaptation.model)]
                for key in module.state_dict()
            }
        )
        with torch.no_grad():
            for layer, update in updates(training.adaptation).items():
                own = module.get_submodule(layer)
                as_matrix(own, own.weight).copy_(as_matrix(own, own.weight) + torch.from_numpy(update))
        images = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        torch.testing.assert_close(outputs(training), module(images), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_cut_is_the_best_approximation(self, name):
        training = on_network(name, components=12, init_rank=3)
        whole = updates(training.adaptation) if name == "triadaptlora" else None
        if whole is None:
            training.run(lambda training: None)
            whole = updates(training.adaptation)
        with training.adaptation.at_rank(2):
            for layer, update in updates(training.adaptation).items():
                np.testing.assert_allclose(update, truncated(whole[layer], 2), atol=1e-10)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_core_that_is_the_identity_and_stays_so_is_lora(self, name, tmp_path):
        """The same losses as methods.lora through the loop, at alpha / r."""
        lora = start(Subject("lora[rank=4]", tmp_path))
        ours = start(Subject(f"{name}[init_rank=4,target_rank=4,orthogonality=0]", tmp_path))
        for layer, theirs in lora.adaptation.layers.items():
            B, A, core = ours.adaptation.parts(layer)
            A.data.copy_(theirs.lora_A["default"].weight)
            B.data.copy_(theirs.lora_B["default"].weight)
            core.data.copy_(ours.adaptation.unit_entries(layer))
            core.requires_grad_(False)
        losses = []
        for started in (lora, ours):
            torch.manual_seed(0)  # of dropout
            started.training.run(lambda training: None)
            losses.append([row["loss"] for row in started.training.history])
        np.testing.assert_allclose(*losses, rtol=1e-6)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_penalty_is_that_of_whole_factors(self, name):
        training = on_network(name, components=6, init_rank=2, orthogonality=0.7)
        distances = []
        for B, A, _ in map(training.adaptation.parts, KINDS):
            for factor in (A.detach().flatten(1).numpy(), B.detach().flatten(1).numpy().T):
                distances.append(np.linalg.norm(factor @ factor.T - np.eye(len(factor))))
        np.testing.assert_allclose(training.adaptation.penalty().item(), 0.7 * np.mean(distances))


def _wrapped(key, model):
    """The name that a weight of the network has in the PEFT model, which keeps the head's trained copy beside it."""
    layer, _, rest = key.rpartition(".")
    names = [f"base_model.model.{layer}{place}.{rest}" for place in (".modules_to_save.default", ".base_layer", "")]
    return next(name for name in names if name in model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_new_component_first_moves_by_the_learning_rate(name, tmp_path):
    """As every entry does in its first step of AdamW, but for its epsilon. By the age of the parameter, here 10
    updates, it would be less than half of that."""
    more = ",advance=false" if name == "increlora" else ""
    started = start(Subject(f"{name}[components=24,tinit=9,deltaT=1,learning_rate=1e-3{more}]", tmp_path))
    while sum(started.adaptation.ranks().values()) == LAYERS:
        started.training.update()
    grown = [layer for layer, rank in started.adaptation.ranks().items() if rank > 1]
    before = {layer: started.adaptation.parts(layer)[2].detach().clone() for layer in grown}
    started.training.update()
    for layer, entries in before.items():
        moved = (started.adaptation.parts(layer)[2].detach()[: len(entries)] - entries)[1 if more else 2 :].abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=0.4, atol=0)


@pytest.mark.parametrize("settings", ["components=25", "target_rank=3,scale=fixed", "components=12"])
@pytest.mark.parametrize("name", NAMES)
def test_an_export_is_a_stock_lora_at_these_ranks(name, settings, tmp_path):
    assert_export_is_stock_lora(trained(f"{name}[{settings}]", tmp_path), tmp_path / "export")


@pytest.mark.parametrize("name", NAMES)
def test_stock_peft_trains_the_ranks_in_its_place(name):
    form = method_of(f"{name}[alpha=12]").peft_form({"a": 1, "b": 3})
    assert (form.config["r"], form.config["rank_pattern"]) == (3, {"^a": 1})
    assert form.config["lora_alpha"] / form.config["r"] == 6.0
    assert method_of(f"{name}[alpha=12,scale=fixed]").peft_form({"a": 1, "b": 3}).config["lora_alpha"] == 36.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("init_rank=4,target_rank=3", "target_rank = 3 is below init_rank = 4"),
        ("init_rank=17,target_rank=20", "init_rank = 17 is above the smaller side of layer"),
        ("components=11", "components = 11 should be 12 to 192 components in 12 layers"),
        ("target_rank=17", "target_rank = 17 should be 12 to 192 components in 12 layers"),
        ("components=0", "components = 0 is not allowed"),
        ("tinit=1.5", "tinit = 1.5 should be a share of the updates below 1, or a whole number of them"),
        ("scale=rank", "scale = 'rank' is not allowed"),
        ("components=24,tinit=7,deltaT=2", "growth reaches 12 of 24 components in 9 batches: it takes at least"),
        (
            "components=99,increment=1,tinit=0.5,deltaT=0.5",
            "components in 9 batches: lower tinit or deltaT, or raise increment",
        ),
    ],
)
def test_bad_settings_are_one_line(name, settings, message, tmp_path, capsys):
    assert_refused(f"{name}[{settings}]", message, tmp_path, capsys, "--batches", "9")


def notes(method, batches):
    backbone = Backbone(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (), ("0", "1"))
    return method.notes(backbone, TrainSpec(batches=batches), 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", ["components=9,tinit=3,deltaT=4", "components=14,increment=1,deltaT=0.1"])
def test_the_least_budget_that_is_named_does(name, settings):
    method = method_of(f"{name}[{settings}]")
    with pytest.raises(InputError, match="it takes at least") as raised:
        notes(method, 3)
    least = int(str(raised.value).split()[-2])
    notes(method, least)
    for batches in range(3, least):
        with pytest.raises(InputError):
            notes(method, batches)


@pytest.mark.parametrize(
    ("chosen", "note"),
    [
        ("increlora[components=2]", "2 components in 2 layers are the target: none grows"),
        (
            "increlora[components=9,increment=2,top_h=1,tinit=2,deltaT=3]",
            "2 components in 2 layers grow to 9 in 4 rounds, after update 5 to 14 of 30",
        ),
        (
            "triadaptlora[components=9,increment=1]",
            "2 components in 2 layers grow to 9 in 7 rounds, after update 1 to 7 of 30",
        ),
    ],
)
def test_a_dry_run_says_how_they_grow(chosen, note):
    assert notes(method_of(chosen), 30) == [note]
