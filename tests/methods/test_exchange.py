"""What ElaLoRA and FlexLoRA share: which components move, when, and that nothing else changes when they do."""

import copy
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

from harness.cli import main
from harness.contracts import Subject, start
from harness.contracts.subject import method_of
from harness.errors import InputError
from harness.method import Backbone
from harness.registry import make_method
from harness.run.streams import TrainingData
from harness.spec import TrainSpec
from methods.shared.exchange import Offer, trades
from tests.support.network import KINDS, method_training
from tests.support.refusals import assert_refused
from tests.support.small_lora import NETWORKS, assert_export_is_stock_lora

METHODS = ("elalora", "flexlora")
FACTORS = (("lora_E", 0), ("lora_A", 0), ("lora_B", 1))


def offer(layer, score, may_leave=True, place=0):
    return Offer(layer, place, score, may_leave)


class TestTrades:
    def test_the_lowest_leave_and_the_owners_of_the_highest_gain(self):
        offers = [offer(0, 0.5), offer(1, 0.1), offer(2, 0.9), offer(3, 0.2)]
        found = trades(offers, 2, dict.fromkeys(range(4), 9))
        assert found == [(offers[1], 2), (offers[3], 0)]

    def test_equal_scores_move_nothing(self):
        assert trades([offer(0, 0.5), offer(1, 0.5)], 4, {0: 9, 1: 9}) == []

    def test_a_layer_without_room_gains_nothing_and_another_does(self):
        offers = [offer(0, 0.0), offer(1, 0.1), offer(2, 0.9, place=1), offer(2, 0.8, place=0), offer(3, 0.7)]
        assert [layer for _, layer in trades(offers, 2, {0: 1, 1: 1, 2: 1, 3: 1})] == [2, 3]
        assert [layer for _, layer in trades(offers, 2, {0: 1, 1: 1, 2: 2, 3: 1})] == [2, 2]

    def test_a_score_that_is_no_number_grows_nothing(self):
        offers = [offer(0, 0.2), offer(1, float("nan")), offer(2, 0.1)]
        assert 1 not in [layer for _, layer in trades(offers, 1, dict.fromkeys(range(3), 9))]

    def test_of_chance(self):
        """No component leaves twice, and none that is above what its gain goes to; no layer gains more than it can."""
        draw = random.Random(0)
        for _ in range(300):
            count = draw.randint(1, 5)
            offers = [
                offer(n, draw.choice([0.1, 0.2, 0.3, 0.4]), draw.random() < 0.7, i)
                for n in range(count)
                for i in (0, 1)
            ]
            number, room = draw.randint(0, 6), {n: draw.randint(0, 2) for n in range(count)}
            found = trades(offers, number, room)
            gone, gaining = [low for low, _ in found], [layer for _, layer in found]
            assert len(set(gone)) == len(found) <= number
            assert all(low.may_leave for low in gone)
            assert all(gaining.count(n) <= room[n] for n in range(count))
            assert all(low.score < max(o.score for o in offers if o.layer == layer) for low, layer in found)


class TestSchedule:
    def test_shares_and_whole_numbers(self):
        method = make_method("elalora", {})
        assert method.phase(1000) == range(120, 701, 20)
        whole = make_method("elalora", {"tinit": 300, "tfinal": 500, "interval": 50})
        assert list(whole.phase(1000)) == [350, 400, 450, 500]
        assert list(make_method("elalora", {"tinit": 0, "tfinal": 0, "interval": 1}).phase(4)) == [1, 2, 3]

    @pytest.mark.parametrize(
        ("name", "decay", "expected"),
        [
            ("elalora", "none", [8, 8, 8, 8]),
            ("elalora", "late", [8, 7, 5, 0]),  # 8 (1 - p^3) with p = 1/4, 2/4, 3/4, 1: 7.9, 7, 4.6, 0
            ("flexlora", "late", [8, 7, 5, 0]),
            ("flexlora", "early", [3, 1, 0, 0]),  # 8 (1 - p)^3: 3.4, 1, 0.1, 0
        ],
    )
    def test_the_number_falls_over_the_phase(self, name, decay, expected):
        settings = {"exchanged": 8, "decay": decay, "tinit": 10, "tfinal": 5, "interval": 5}
        method = make_method(name, settings)
        assert [method.number_after(update, 35) for update in (15, 20, 25, 30)] == expected
        assert not any(method.number_after(update, 35) for update in (5, 10, 14, 16, 31, 35))

    @pytest.mark.parametrize("tinit", [0, 0.1, 0.6, 7])
    @pytest.mark.parametrize("tfinal", [0, 0.3, 12])
    @pytest.mark.parametrize("interval", [0.001, 0.09, 1, 40])
    def test_the_least_budget_is_named(self, tinit, tfinal, interval):
        method = make_method("flexlora", {"tinit": tinit, "tfinal": tfinal, "interval": interval})
        fits = [n for n in range(1, 400) if method.phase(n)]
        backbone = Backbone(nn.Sequential(nn.Linear(9, 9)), (), ("0",))
        for batches in {1, fits[0] - 1} - {0}:
            with pytest.raises(InputError, match=rf"no exchange in {batches} updates: give at least {fits[0]} batches"):
                method.notes(backbone, TrainSpec(batches=batches), 50)
        assert method.notes(backbone, TrainSpec(batches=fits[0]), 50)

    def test_without_exchanges_any_budget_will_do(self):
        method = make_method("elalora", {"exchanged": 0, "tinit": 100})
        (note,) = method.notes(Backbone(nn.Sequential(nn.Linear(9, 9)), (), ("0",)), TrainSpec(batches=3), 50)
        assert note == "8 components in 1 layers stay where they are"


def terms(adaptation):
    """Of each layer the update of every component, (r, outputs, inputs), by its definition."""
    found = {}
    for name, layer in adaptation.layers.items():
        E, A, B = (getattr(layer, factor)["default"].detach() for factor, _ in FACTORS)
        scale = adaptation.method.alpha / (adaptation.method.rank + 1e-5)
        found[name] = scale * torch.einsum("mr,r,rn->rmn", B, E[:, 0], A)
    return found


def held(adaptation):
    """Of each layer's factors the values and what the optimizer holds of them, components first."""
    found = {}
    for name, layer in adaptation.layers.items():
        for factor, dim in FACTORS:
            parameter = getattr(layer, factor)["default"]
            state = adaptation.optimizer.state[parameter]
            of_it = {"value": parameter} | {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
            found |= {(name, factor, key): value.detach().clone().movedim(dim, 0) for key, value in of_it.items()}
    return found


def watched(name, batches=12, **settings):
    """A run in float64 on a convolution, a linear and a transposed layer, with what was there before and after each
    exchange."""
    given = {"rank": 3, "learning_rate": 3e-2, "exchanged": 2, "tinit": 2, "tfinal": 2, "interval": 2}
    training = method_training(make_method(name, given | {"decay": "none"} | settings), batches=batches)
    adaptation = training.adaptation
    after_step, observe, before, seen = adaptation.after_step, adaptation.observe, [], []

    def remember():
        before[:] = adaptation.ranks(), terms(adaptation), held(adaptation)
        observe()

    def watch(step):
        row = after_step(step)
        if row:
            seen.append((tuple(before), (adaptation.ranks(), terms(adaptation), held(adaptation)), row))
        return row

    adaptation.after_step, adaptation.observe = watch, remember
    training.run(lambda training: None)
    return training, seen


@pytest.mark.parametrize("name", METHODS)
class TestExchange:
    def test_it_removes_whole_components_and_adds_what_changes_nothing(self, name):
        """The update is what it was less the terms of the components that left, to 1e-12; the others keep their values
        and their moments; the new ones have an E of 0 and no past."""
        _, seen = watched(name)
        moved = 0
        for (ranks, own, past), (ranks_after, own_after, past_after), row in seen:
            for layer in KINDS:
                rows, rows_after = past[layer, "lora_A", "value"], past_after[layer, "lora_A", "value"]
                stay = [place for place, q in enumerate(rows) if any(torch.equal(q, other) for other in rows_after)]
                gone = sorted(set(range(len(rows))) - set(stay))
                expected = own[layer].sum(0) - own[layer][gone].sum(0)
                torch.testing.assert_close(own_after[layer].sum(0), expected, rtol=0, atol=1e-12)
                for (of, factor, key), value in past.items():
                    after = past_after[of, factor, key]
                    assert of != layer or torch.equal(value[stay], after[: len(stay)]), (factor, key)
                    if of == layer and (key != "value" or factor == "lora_E"):
                        assert value[stay].any()
                        assert not after[len(stay) :].any()
                assert all(own[layer][place].abs().max() > 1e-6 for place in gone)
                moved += len(gone)
            assert sum(ranks.values()) == sum(ranks_after.values()) == row["rank"] == 9
            assert row["ranks"] == list(ranks_after.values())
        assert moved == sum(row["exchanged"] for *_, row in seen) > 3
        assert len(seen) == 4

    def test_what_is_new_trains(self, name):
        """Two updates after its birth a component is in use: it had a gradient."""
        training, seen = watched(name, interval=8)
        ((ranks, *_), (ranks_after, *_), _) = seen[0]
        grown = [layer for layer in KINDS if ranks_after[layer] > ranks[layer]]
        assert len(seen) == 1
        assert grown
        for layer in grown:
            assert training.adaptation.layers[layer].lora_E["default"][-1].abs() > 1e-4

    def test_every_layer_keeps_one_and_none_is_above_its_side(self, name):
        training, _ = watched(name, batches=40, exchanged=9, tinit=0, tfinal=0, interval=1)
        ranks = training.adaptation.ranks()
        sides = {"convolution": 4, "linear": 10, "transposed": 8}
        assert all(1 <= rank <= sides[layer] for layer, rank in ranks.items())
        assert sum(ranks.values()) == 9

    def test_a_layer_that_no_loss_reaches_gives_its_components_away(self, name):
        """Nothing is learned there; its E are 0 and have no gradient. (For ElaLoRA that of the penalty would count.)"""
        given = {"rank": 2, "exchanged": 1, "tinit": 2, "tfinal": 2, "interval": 2, "orthogonality": 0}
        training = method_training(make_method(name, given), layers=(*KINDS, "unused"))
        training.run(lambda training: None)
        assert training.adaptation.ranks()["unused"] == 1

    def test_an_exchange_changes_the_run_and_nothing_before_it(self, name):
        settings = f"{name}[rank=4,tinit=4,interval=4,tfinal=4]"
        still = f"{name}[rank=4,exchanged=0]"
        one, other = (losses(text) for text in (settings, still))
        assert one[:8] == other[:8]
        assert one[9:] != other[9:]

    def test_without_exchanges_it_is_an_svd_lora_of_fixed_rank(self, name):
        """The same losses as PEFT's AdaLoRA layers in a loop of their own, whose forward adds the penalty to a model
        with labels."""
        run = start(Subject(f"{name}[rank=4,exchanged=0]", Path()))
        config = AdaLoraConfig(
            init_r=4, lora_alpha=16, total_step=24, orth_reg_weight=0.1,
            target_modules=list(run.before.layers), modules_to_save=list(run.before.head),
        )  # fmt: skip
        bare = get_peft_model(copy.deepcopy(run.before.module), config)
        bare.load_state_dict(run.adaptation.model.state_dict())
        optimizer = torch.optim.AdamW([p for p in bare.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        data, found = TrainingData(run.training.data.size, 8, 0), []
        bare.eval(), run.adaptation.model.eval()  # without dropout, neither draws random numbers
        for _ in range(24):
            batch = run.task.collate(run.training.encoded, data.draw("all"), None)
            loss = bare.base_model(**batch.inputs, labels=batch.labels).loss
            with torch.no_grad():
                found.append(nn.functional.cross_entropy(bare(**batch.inputs).logits, batch.labels).item())
            loss.backward()
            nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        run.training.run(lambda training: None)
        assert [row["loss"] for row in run.training.history] == pytest.approx(found, rel=1e-5)
        assert set(run.adaptation.ranks().values()) == {4}

    def test_components_are_the_total_from_the_start_on(self, name):
        run = start(Subject(f"{name}[components=41]", Path()))
        assert list(run.adaptation.ranks().values()) == [4] * 5 + [3] * 7
        run.training.run(lambda training: None)
        ranks, count = run.adaptation.ranks(), run.training.sizes.parameters()
        assert sum(ranks.values()) == 41
        assert len(set(ranks.values())) > 2
        assert count.adapter_final == sum(rank * (1 + sum(run.before.shape(layer))) for layer, rank in ranks.items())
        assert count.stored_bytes == 4 * (count.adapter_final + count.head)
        assert all(size.rank == 41 for size in run.training.sizes.trajectory)

    def test_an_export_is_a_stock_lora_at_these_ranks(self, name, tmp_path):
        run = start(Subject(f"{name}[components=30]", tmp_path))
        run.training.run(lambda training: None)
        assert len(set(run.adaptation.ranks().values())) > 1
        assert_export_is_stock_lora(run, tmp_path / "export")

    def test_an_export_of_convolutions(self, name, tmp_path):
        torch.manual_seed(0)
        make, shape = NETWORKS["convolution"]
        module = make().double()
        settings = {"rank": 2, "tinit": 1, "interval": 1, "tfinal": 1, "learning_rate": 0.1}
        method = make_method(name, settings)
        adaptation = method.start(Backbone(copy.deepcopy(module), (), ("0", "2")), None, None, torch.Generator())
        images, exchanged = torch.randn(*shape, dtype=torch.float64), 0
        for used in range(1, 7):
            adaptation.model(images).sin().square().mean().backward()
            adaptation.optimizer.step()
            step = SimpleNamespace(index=used - 1, used=used, budget=6, rng=torch.Generator().manual_seed(used))
            exchanged += adaptation.after_step(step).get("exchanged", 0)
            adaptation.optimizer.zero_grad()
        assert exchanged > 0
        assert sum(adaptation.ranks().values()) == 4
        adaptation.export(tmp_path)
        loaded = PeftModel.from_pretrained(module, tmp_path, torch_dtype=torch.float64)
        torch.testing.assert_close(loaded(images), adaptation.model(images), rtol=0, atol=1e-5)

    def test_stock_peft_trains_what_it_came_to_in_its_place(self, name):
        form = method_of(f"{name}[rank=8,alpha=4]").peft_form({"a": 2, "b": 1})
        assert (form.config["r"], form.config["lora_alpha"]) == (2, 1.0)

    def test_a_dry_run_says_how_many_are_exchanged(self, name, tmp_path, capsys):
        options = ["--tasks", "synthetic", "--batches", "40", "--results", str(tmp_path), "--dry-run"]
        assert main(["run", "--methods", f"{name}[decay=none]", *options]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (
            "96 components in 12 layers: at most 96 are exchanged, in 24 exchanges after updates 5 to 28 of 40" in said
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ("rank=17", "rank = 17 is above the smaller side of layer"),
            (
                "components=11",
                "components = 11 should be 12 to 192: one to 16 in each of 12 layers, 16 being the smaller",
            ),
            ("components=193", "components = 193 should be 12 to 192"),
            ("exchanged=-1", ".exchanged = -1 is not allowed"),
            ("tinit=1.5", "tinit = 1.5 should be a share of the updates below 1, or a whole number of them"),
            ("tinit=0.5,tfinal=0.5", "tinit = 0.5, tfinal = 0.5, interval = 0.02 are 1.02 of the updates together"),
            (
                "tinit=3000",
                "tinit = 3000, tfinal = 0.3, interval = 0.02 leave no exchange in 12 updates: give at least 4411",
            ),
            ("decay=lat", ".decay = 'lat' is not allowed"),
        ],
    )
    def test_bad_settings_are_one_line(self, settings, message, name, tmp_path, capsys):
        assert_refused(f"{name}[{settings}]", message, tmp_path, capsys, "--batches", "12")


def losses(name):
    run = start(Subject(name, Path()))
    run.training.run(lambda training: None)
    return [row["loss"] for row in run.training.history]
