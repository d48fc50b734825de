"""LoRA-Squeeze: what a cut keeps, that nothing jumps, Adam's moments, the stages, exact resume, export."""

import numpy as np
import pytest
import torch
from torch import nn

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.contracts.subject import method_of, spec_of
from harness.method import Backbone
from harness.record.store import RecordStore
from harness.run.run import run_one
from tests.support.refusals import assert_refused, least_that_does
from tests.support.small_lora import (
    NETWORKS,
    FakeStep,
    adapted,
    assert_export_is_stock_lora,
    outputs,
    singular_values,
    truncated,
    updates,
)
from tests.support.trained import trained

LAYERS = 12  # of the synthetic task, whose one component of each layer has 448 numbers
FORMS = ["squeeze=post", "squeeze=continued,squeeze_at=0.5", "squeeze=in_training,stages=3"]


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize(
    "settings",
    [
        "squeeze=continued,squeeze_at=0.4,components=7",
        "squeeze=in_training,target_rank=1,moments=fresh",
    ],
)
def test_contracts(settings, contract, tmp_path):
    """Some layers have no components left. The form "post" is tried with the other methods."""
    contract(Subject(f"lora_squeeze[rank=4,{settings}]", tmp_path))


def pairs(adaptation):
    """The parameters (B, A) of each layer."""
    found = adaptation.layers.items()
    return {name: (layer.lora_B["default"].weight, layer.lora_A["default"].weight) for name, layer in found}


class TestCut:
    """Against NumPy's SVD of whole matrices, in float64."""

    @pytest.mark.parametrize("network", NETWORKS)
    @pytest.mark.parametrize("rank", [1, 2])
    def test_it_is_the_best_approximation(self, rank, network):
        adaptation = adapted("lora_squeeze", network, {"target_rank": rank})
        before = updates(adaptation)
        adaptation.finish(FakeStep(10))
        assert set(adaptation.ranks().values()) == {rank}
        for name, update in updates(adaptation).items():
            np.testing.assert_allclose(update, truncated(before[name], rank), atol=1e-12)
            error = ((before[name] - update) ** 2).sum()
            np.testing.assert_allclose(error, (np.linalg.svd(before[name])[1][rank:] ** 2).sum(), rtol=1e-10)

    @pytest.mark.parametrize("network", NETWORKS)
    @pytest.mark.parametrize("components", [1, 3, 4])
    def test_a_budget_keeps_the_largest_of_all_layers(self, components, network):
        adaptation = adapted("lora_squeeze", network, {"components": components})
        with torch.no_grad():
            pairs(adaptation)["0"][0].mul_(0.5)
        before = updates(adaptation)
        values = sorted(((v, name) for name, own in singular_values(before).items() for v in own), reverse=True)
        adaptation.finish(FakeStep(10))
        kept = [name for _, name in values[:components]]
        assert adaptation.ranks() == {name: kept.count(name) for name in before}
        found = outputs(adaptation, network)  # also of a layer without components
        for name, update in before.items():
            weight = adaptation.layers[name].get_base_layer().weight.data
            weight += torch.from_numpy(truncated(update, kept.count(name))).view_as(weight)
            adaptation.layers[name].enable_adapters(False)
        torch.testing.assert_close(found, outputs(adaptation, network), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("network", NETWORKS)
    def test_the_factors_share_the_singular_values(self, network):
        """B = U S^1/2 and A = S^1/2 V^T, and so the first k components are the best approximation of rank k."""
        adaptation = adapted("lora_squeeze", network, {"target_rank": 2})
        before = updates(adaptation)
        adaptation.finish(FakeStep(10))
        for name, (B, A) in pairs(adaptation).items():
            B, A, scale = B.detach().flatten(1).numpy(), A.detach().flatten(1).numpy(), 16 / 3
            values = np.diag(singular_values(before)[name][:2]) / scale
            np.testing.assert_allclose(B.T @ B, values, atol=1e-12)
            np.testing.assert_allclose(A @ A.T, values, atol=1e-12)
            np.testing.assert_allclose(scale * B[:, :1] @ A[:1], truncated(before[name], 1), atol=1e-12)
            with adaptation.at_rank(1):
                np.testing.assert_allclose(updates(adaptation)[name], truncated(before[name], 1), atol=1e-12)

    @pytest.mark.parametrize("network", NETWORKS)
    def test_what_is_whole_at_the_target_does_not_jump(self, network):
        """Of rank 2 in three columns, cut to two while it trains: the function is what it was, the scale is."""
        settings = {"squeeze": "continued", "squeeze_at": 0.5, "target_rank": 2}
        adaptation = adapted("lora_squeeze", network, settings)
        with torch.no_grad():
            for B, _ in pairs(adaptation).values():
                B[:, 2] = 2 * B[:, 0] - B[:, 1]
        before, weights = outputs(adaptation, network), updates(adaptation)
        adaptation.after_step(FakeStep(5))
        assert set(adaptation.ranks().values()) == {2}
        torch.testing.assert_close(outputs(adaptation, network), before, rtol=0, atol=1e-10)
        for name, update in updates(adaptation).items():
            np.testing.assert_allclose(update, weights[name], atol=1e-10)
        assert {layer.scaling["default"] for layer in adaptation.layers.values()} == {16 / 3}

    def test_stages_without_training_end_where_one_cut_does(self):
        settings = {"squeeze": "in_training", "stages": 3, "target_rank": 1}
        by_stages, at_once = (adapted("lora_squeeze", "linear", more) for more in (settings, {"target_rank": 1}))
        for used in range(1, 11):
            by_stages.after_step(FakeStep(used))
        at_once.finish(FakeStep(10))
        for name, update in updates(at_once).items():
            np.testing.assert_allclose(updates(by_stages)[name], update, atol=1e-12)

    @pytest.mark.parametrize("form", FORMS)
    def test_the_source_rank_as_the_target_is_lora_bit_for_bit(self, form, tmp_path):
        ours, lora = (
            trained(f"{name}]", tmp_path) for name in (f"lora_squeeze[rank=4,{form},target_rank=4", "lora[rank=4")
        )
        assert ours.training.history == lora.training.history
        found = ours.adaptation.model.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in lora.adaptation.model.state_dict().items())


class TestMoments:
    """One layer and a loss that is linear in its weights, so that gradients do not depend on what a cut removes."""

    LAYERS = {
        "linear": (lambda: nn.Linear(7, 5), (4, 7)),
        "convolution": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 4, 4)),
    }

    def started(self, kind, moments):
        """With the gradients of ten batches in AdamW, whose learning rate is 0, and those batches' losses."""
        torch.manual_seed(0)
        make, shape = self.LAYERS[kind]
        backbone = Backbone(nn.Sequential(make().double()), (), ("0",))
        settings = {"squeeze": "continued", "squeeze_at": 0.9, "rank": 4, "target_rank": 2, "moments": moments}
        method = registry.make_method("lora_squeeze", settings)
        adaptation = method.start(backbone, None, None, torch.Generator())
        with torch.no_grad():
            (pair,) = pairs(adaptation).values()
            for weight in pair:
                weight.normal_()
        weights = [torch.randn_like(adaptation.model(torch.zeros(*shape).double())) for _ in range(9)]
        inputs = [torch.randn(*shape, dtype=torch.float64) for _ in range(9)]

        def losses():
            return ((adaptation.model(x) * w).sum() for x, w in zip(inputs, weights, strict=True))

        adaptation.optimizer.param_groups[0]["lr"] = 0.0
        for used, loss in enumerate(losses(), start=1):
            adaptation.optimizer.zero_grad()
            loss.backward()
            adaptation.optimizer.step()
            if used < 9:
                assert adaptation.after_step(FakeStep(used)) == {}
        return adaptation, pair, losses

    @pytest.mark.parametrize("kind", LAYERS)
    def test_first_ones_are_those_of_the_new_factors_gradients(self, kind):
        """As if the whole history had been at the pair that there is now."""
        adaptation, pair, losses = self.started(kind, "mapped")
        assert adaptation.after_step(FakeStep(9)) == {"rank": 2}
        expected = [torch.zeros_like(weight) for weight in pair]
        for loss in losses():
            for mean, gradient in zip(expected, torch.autograd.grad(loss, pair), strict=True):
                mean.mul_(0.9).add_(0.1 * gradient)
        for weight, mean in zip(pair, expected, strict=True):
            torch.testing.assert_close(adaptation.optimizer.state[weight]["exp_avg"], mean, rtol=1e-9, atol=1e-9)
            assert adaptation.optimizer.state[weight]["step"] == 9

    @pytest.mark.parametrize("kind", LAYERS)
    def test_they_are_mapped_by_the_other_factors_change(self, kind):
        """B' = B P_B and A' = P_A A: m_B' = m_B P_A^T and m_A' = P_B^T m_A; second ones by the squared entries."""
        adaptation, pair, _ = self.started(kind, "mapped")
        state = adaptation.optimizer.state

        def matrices(name=None):
            values = [weight.detach() if name is None else state[weight][name] for weight in pair]
            return [value.flatten(1).numpy().copy() for value in values]

        (B, A), m, v = matrices(), matrices("exp_avg"), matrices("exp_avg_sq")
        adaptation.after_step(FakeStep(9))
        new_B, new_A = matrices()
        P_B, P_A = np.linalg.lstsq(B, new_B, rcond=None)[0], np.linalg.lstsq(A.T, new_A.T, rcond=None)[0].T
        np.testing.assert_allclose(B @ P_B, new_B, atol=1e-10)
        for found, expected in zip(matrices("exp_avg"), (m[0] @ P_A.T, P_B.T @ m[1]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
        squares = v[0] @ (P_A**2).T, (P_B**2).T @ v[1]
        for found, expected in zip(matrices("exp_avg_sq"), squares, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)

    def test_fresh_ones_begin_anew(self):
        adaptation, pair, losses = self.started("linear", "fresh")
        adaptation.after_step(FakeStep(9))
        assert all(weight not in adaptation.optimizer.state for weight in pair)
        adaptation.optimizer.zero_grad()
        next(losses()).backward()
        adaptation.optimizer.step()
        for weight in pair:
            assert adaptation.optimizer.state[weight]["step"] == 1
            torch.testing.assert_close(adaptation.optimizer.state[weight]["exp_avg"], 0.1 * weight.grad)

    def test_fresh_ones_leave_the_heads_alone(self, tmp_path):
        started = trained("lora_squeeze[rank=4,squeeze=continued,squeeze_at=0.5,moments=fresh]", tmp_path, batches=10)
        optimizer, cut = started.adaptation.optimizer, [w for pair in pairs(started.adaptation).values() for w in pair]
        held = [p for group in optimizer.param_groups for p in group["params"]]
        steps = {int(optimizer.state[p]["step"]) for p in held if not any(p is w for w in cut)}
        assert (steps, {int(optimizer.state[w]["step"]) for w in cut}) == ({10}, {5})


class TestStages:
    @pytest.mark.parametrize(
        ("settings", "trajectory"),
        [
            ("rank=8", [(0, 8), (24, 2)]),
            ("rank=8,squeeze=continued,target_rank=3", [(0, 8), (20, 3)]),
            ("rank=8,squeeze=in_training", [(0, 8), (8, 4), (16, 2)]),
            ("rank=8,squeeze=in_training,stages=5,target_rank=1", [(0, 8), (5, 5), (10, 3), (15, 2), (20, 1)]),
        ],
    )
    def test_ranks_and_sizes_over_the_run(self, settings, trajectory, tmp_path):
        started = trained(f"lora_squeeze[{settings}]", tmp_path)
        sizes = [(size.batches, size.adapter_parameters, size.rank) for size in started.training.sizes.trajectory]
        assert sizes == [(batches, 448 * rank, LAYERS * rank) for batches, rank in trajectory]
        count = started.training.sizes.parameters()
        assert count.adapter_initial == count.adapter_peak == 448 * 8
        assert count.adapter_final == 448 * trajectory[-1][1]
        rows = {row["batches"]: row["rank"] for row in started.training.history if "rank" in row}
        assert rows == {batches: LAYERS * rank for batches, rank in trajectory[1:] if "squeeze=" in settings}

    def test_a_budget_falls_geometrically_over_all_layers(self, tmp_path):
        started = trained("lora_squeeze[rank=4,squeeze=in_training,components=3]", tmp_path)
        assert [size.rank for size in started.training.sizes.trajectory] == [48, 12, 3]

    @pytest.mark.parametrize("form", FORMS[1:])
    def test_training_goes_on_at_the_target(self, form, tmp_path):
        """The layers that are left train, and those without components are their base layers."""
        started = start(Subject(f"lora_squeeze[rank=4,{form},components=5]", tmp_path), batches=24)
        while sum(started.adaptation.ranks().values()) > 5:
            started.training.update()
        assert started.training.used < 24
        before = updates(started.adaptation)
        started.training.update()
        for name, update in updates(started.adaptation).items():
            layer, x = started.adaptation.layers[name], torch.randn(3, started.adaptation.layers[name].in_features)
            live = started.adaptation.ranks()[name] > 0
            assert (
                live == (not np.array_equal(update, before[name])) == (not torch.equal(layer(x), layer.base_layer(x)))
            )

    def test_post_is_a_lora_until_it_is_trained(self, tmp_path):
        ours, lora = (trained(name, tmp_path) for name in ("lora_squeeze[rank=4,target_rank=1]", "lora[rank=4]"))
        assert ours.training.history == lora.training.history
        whole = updates(lora.adaptation)
        for name, update in updates(ours.adaptation).items():
            np.testing.assert_allclose(update, truncated(whole[name], 1), atol=1e-6)


def test_a_cut_of_a_run_that_diverged_says_so(tmp_path):
    """It comes before the loop has seen the loss."""
    store = RecordStore(tmp_path)
    store.make_ready()
    name = "lora_squeeze[rank=4,squeeze=in_training,stages=5,learning_rate=1e38]"
    record = run_one(spec_of(Subject(name, tmp_path, batches=10)), store)
    assert (record.status, record.error) == ("diverged", "an adapter's factors are not finite")


@pytest.mark.parametrize("size", ["target_rank=2", "components=5"])
@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_a_stock_lora_at_these_ranks(form, size, tmp_path):
    started = trained(f"lora_squeeze[rank=4,{form},{size}]", tmp_path)
    assert_export_is_stock_lora(started, tmp_path / "export")


def test_stock_peft_trains_the_target_in_its_place():
    form = method_of("lora_squeeze[rank=8,alpha=4]").peft_form({"a": 2, "b": 1, "c": 0})
    assert (form.config["r"], form.config["lora_alpha"]) == (2, 1.0)
    assert form.config["alpha_pattern"] == {"^b": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("rank=4,target_rank=5", "target_rank = 5 is above rank = 4: it should be 1 to that"),
        ("target_rank=2,components=3", "target_rank = 2 and components = 3 are both set; give one of them"),
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("components=97", "components = 97 is above the 96 that there are"),
        ("components=0", "lora_squeeze.components = 0 is not allowed"),
        (
            "squeeze=during",
            "lora_squeeze.squeeze = 'during' is not allowed: it should be 'post', 'continued' or 'in_tr",
        ),
        ("squeeze_at=0.5", "squeeze_at = 0.5 is for squeeze = continued, not for post"),
        ("squeeze=continued,stages=4", "stages = 4 is for squeeze = in_training, not for continued"),
        ("moments=fresh", "moments = fresh is for squeeze = continued or in_training, not for post"),
        ("squeeze=in_training,stages=1", "lora_squeeze.stages = 1 is not allowed"),
        ("squeeze=in_training,stages=10", "stages = 10 does not fit into 9 batches: it takes at least 10"),
        ("squeeze=continued,squeeze_at=0.9", "squeeze_at = 0.9 does not fit into 9 batches: it takes at least 10"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    assert_refused(f"lora_squeeze[{settings}]", message, tmp_path, capsys, "--batches", "9")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.99])
def test_the_least_budget_that_is_named_does(share, tmp_path, capsys):
    method = method_of(f"lora_squeeze[squeeze=continued,squeeze_at={share}]")
    least_that_does(lambda batches: notes(method, batches))


def notes(method, batches):
    from harness.spec import TrainSpec

    backbone = Backbone(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (), ("0", "1"))
    return method.notes(backbone, TrainSpec(batches=batches), 100)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ("", "16 components in 2 layers to batch 30 of 30, 4 are left then"),
        ("squeeze=continued,components=5", "16 components in 2 layers to batch 24 of 30, 5 to batch 30"),
        ("squeeze=in_training", "16 components in 2 layers to batch 10 of 30, 8 to batch 20, 4 to batch 30"),
    ],
)
def test_a_dry_run_says_how_many_there_are_when(settings, note):
    assert notes(method_of(f"lora_squeeze[{settings}]"), 30) == [note]
