"""FlyLoRA: the sparse A, the choice against a slow one, gradients, the balance, LoRA-FA as its limit, files."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from harness import registry
from harness.contracts import Subject
from harness.contracts.methods import (
    a_cut_to_a_rank_has_it_and_is_undone,
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    counts_are_right,
)
from harness.errors import InputError
from harness.method import Backbone
from harness.optimizer import adamw
from harness.spec import TrainSpec
from methods.flylora import load, sparse_projection
from tests.support.network import method_training
from tests.support.refusals import assert_refused
from tests.support.routed import LAYERS, STEP, TEXTS, changed_byte, inputs_of, logits, on_bert, tiny_bert
from tests.support.small_lora import assert_export_is_stock_lora
from tests.support.trained import trained

ON_NETWORK = ("linear", "transposed")  # (10, 36) and (8, 10)


def flylora(**settings):
    return registry.make_method("flylora", settings)


@pytest.mark.parametrize(
    ("settings", "contract"),
    [
        ("rank=4,top_k=4", a_cut_to_a_rank_has_it_and_is_undone),
        ("rank=4,top_k=4", counts_are_right),
        (
            "components=31,selection=value,dropout=0.1,balance_step=0.05",
            a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
        ),
    ],
)
def test_contracts(settings, contract, tmp_path):
    """With other settings than those that every method is tried with."""
    contract(Subject(f"flylora[{settings}]", tmp_path))


class TestProjection:
    def test_every_row_has_so_many_entries_at_places_of_its_own(self):
        A = sparse_projection(32, 200, 50, torch.Generator().manual_seed(0))
        assert A.count_nonzero(1).tolist() == 32 * [50]
        assert len({tuple(row.nonzero().flatten().tolist()) for row in A}) == 32
        assert A[A != 0].std().item() == pytest.approx(1 / 32, rel=0.05)
        assert A.count_nonzero(0).float().mean().item() == pytest.approx(8)

    @pytest.mark.parametrize(("rank", "top_k", "entries"), [(8, 3, 6), (8, 8, 16), (5, 1, 3), (5, 2, 6)])
    def test_their_number_is_the_share_of_the_components_that_is_chosen(self, rank, top_k, entries):
        run = on_bert("flylora", rank=rank, top_k=top_k, target_modules=["query"])
        assert run.routers[LAYERS[0]].weight.count_nonzero(1).tolist() == rank * [entries]

    def test_another_seed_draws_another_one(self):
        one, two = (sparse_projection(4, 9, 3, torch.Generator().manual_seed(seed)) for seed in (0, 1))
        assert not torch.equal(one, two)


SCORES = {
    "magnitude": lambda y, d: abs(y) + d,
    "value": lambda y, d: y + d,
    "shifted": lambda y, d: abs(y + d),
}


def with_a_convolution():
    model = tiny_bert()
    model.set_submodule(LAYERS[0], nn.Conv2d(16, 16, 1))
    return model


def by_hand(x, layer, router, d, k, selection):
    """The update of a token, (inputs,) to (outputs,), and the components that it uses, in NumPy."""
    y = np.array([np.dot(row, x) for row in router.weight.numpy()])
    scores = [SCORES[selection](*pair) for pair in zip(y, d, strict=True)]
    used = sorted(range(len(y)), key=lambda i: -scores[i])[:k]
    B = layer.lora_B["default"].weight.detach().numpy()
    return layer.scaling["default"] * sum(B[:, i] * y[i] for i in used), used


@pytest.mark.parametrize("selection", SCORES)
def test_a_token_uses_its_top_k(selection):
    run = on_bert("flylora", top_k=2, selection=selection)
    layer, router = run.layers[LAYERS[0]], run.routers[LAYERS[0]]
    d = router.load_bias.copy_(torch.linspace(-0.2, 0.2, 6)).numpy()
    x = inputs_of(run, LAYERS[0]).flatten(0, 1)
    with torch.no_grad():
        found = (layer(x) - layer.get_base_layer()(x)).numpy()
    wanted = {name: [by_hand(token, layer, router, d, 2, name) for token in x.numpy()] for name in SCORES}
    np.testing.assert_allclose(found, np.stack([update for update, _ in wanted[selection]]), rtol=0, atol=1e-5)
    used = {name: tuple(tuple(sorted(own)) for _, own in each) for name, each in wanted.items()}
    assert len(set(used[selection])) > 3, "all tokens choose alike"
    assert len(set(used.values())) == 3, "two rules choose alike"


def test_the_choice_changes_what_the_model_computes():
    models = [on_bert("flylora", top_k=top_k) for top_k in (2, 6)]
    for own, other in zip(models[0].routers.values(), models[1].routers.values(), strict=True):
        own.weight.copy_(other.weight)
    assert not torch.allclose(*(logits(run.model) for run in models), atol=1e-2)


def test_gradients_go_to_b_and_through_the_adapter_to_the_input():
    """The authors' fork cuts the second."""
    training = method_training(flylora(rank=4, top_k=2), ("linear",))
    layer = training.adaptation.layers["linear"]
    B, A = layer.lora_B["default"].weight, training.adaptation.routers["linear"].weight
    with torch.no_grad():
        B.normal_()
    x = torch.randn(5, 36, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 10, dtype=torch.float64)
    y = x.detach() @ A.T
    m = (y.abs() >= y.abs().sort(1).values[:, -2:-1]).double()
    to_x, to_B = torch.autograd.grad(layer(x), (x, B), g)
    scale = layer.scaling["default"]
    torch.testing.assert_close(to_x, g @ layer.get_base_layer().weight + scale * ((g @ B) * m) @ A)
    torch.testing.assert_close(to_B, scale * g.T @ (y * m))


class TestBalance:
    def test_d_follows_the_counts_of_the_batchs_tokens_without_padding(self):
        run = on_bert("flylora", top_k=2, balance_step=0.25)
        with run.for_batch(STEP):
            run.model(**TEXTS)
        real = TEXTS["attention_mask"].bool()
        for name, router in run.routers.items():
            counts, padded = np.zeros(6), np.zeros(6)
            for token, is_real in zip(inputs_of(run, name).flatten(0, 1), real.flatten(), strict=True):
                used = by_hand(token.numpy(), run.layers[name], router, np.zeros(6), 2, "magnitude")[1]
                padded[used] += 1
                counts[used] += float(is_real)
            assert run.counts[name].tolist() == counts.tolist() != padded.tolist()
            assert counts.sum() == 2 * 15
        run.after_step(STEP)
        for name, router in run.routers.items():
            counts = run.counts[name].tolist()
            assert router.load_bias.tolist() == [0.25 * float(np.sign(5 - count)) for count in counts]

    def test_batches_that_are_not_trained_on_are_not_counted(self):
        run = on_bert("flylora", top_k=2)
        logits(run.model)
        run.model.train()(**TEXTS)
        assert run.after_step(STEP) == {}
        assert not any(router.load_bias.any() for router in run.routers.values())

    def test_micro_batches_count_together(self):
        biases = []
        for micro_batches in (1, 4):
            training = method_training(flylora(rank=6, top_k=2), ON_NETWORK, batches=1, micro_batches=micro_batches)
            training.run(lambda training: None)
            assert all(int(count.sum()) == 16 for count in training.adaptation.counts.values())
            biases.append([router.load_bias.tolist() for router in training.adaptation.routers.values()])
        assert biases[0] == biases[1]
        assert any(map(any, biases[0]))

    @pytest.mark.parametrize("selection", SCORES)
    def test_it_evens_out_how_often_components_are_chosen(self, selection):
        """By |y + d|, as the authors' file has it, it does the contrary: a component that is chosen too often has its d
        lowered, and below 0 it is chosen all the more."""
        texts = torch.randint(5, 40, (8, 16), generator=torch.Generator().manual_seed(3))
        run = on_bert("flylora", rank=8, top_k=2, selection=selection, balance_step=0.005)
        loads = []
        for _ in range(120):
            with run.for_batch(STEP), torch.no_grad():
                run.model(texts)
            loads.append(run.after_step(STEP)["imbalance"].item())
        before, after = loads[0], np.mean(loads[-20:])
        assert before > 2
        assert after > 1.5 * before if selection == "shifted" else after < 1.5

    def test_without_a_step_there_is_none(self):
        run = trained("flylora[rank=8,balance_step=0.0]", batches=2)
        assert not any(router.load_bias.any() for router in run.adaptation.routers.values())


def test_at_k_equal_to_the_rank_it_is_a_lora_with_a_frozen_a():
    own = method_training(flylora(rank=4, top_k=4, alpha=8), ON_NETWORK)
    lora = method_training(registry.make_method("lora", {"rank": 4, "alpha": 8}), ON_NETWORK)
    for name, layer in lora.adaptation.layers.items():
        A = layer.lora_A["default"].weight.requires_grad_(False)
        A.copy_(own.adaptation.routers[name].weight)
    lora.adaptation.optimizer = adamw(lora.adaptation.model, 1e-3, 0.0)
    for training in (own, lora):
        training.run(lambda training: None)
    losses = [[row["loss"] for row in training.history] for training in (own, lora)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][-1]


def test_there_it_is_exported_as_a_stock_lora(tmp_path):
    run = trained("flylora[rank=4,top_k=4]")
    assert_export_is_stock_lora(run, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert run.adaptation.stored_bytes() == sum(4 * value.numel() for value in tensors.values())


def test_a_stays_and_b_trains():
    run = trained("flylora[rank=4]", batches=3)
    before = trained("flylora[rank=4]", batches=1)
    for name, router in run.adaptation.routers.items():
        assert torch.equal(router.weight, before.adaptation.routers[name].weight)
        assert run.adaptation.layers[name].lora_B["default"].weight.any()
    layers = run.before.layers
    assert run.adaptation.adapter_parameters() == sum(4 * run.before.shape(name)[0] for name in layers)


class TestFiles:
    def test_an_export_gives_the_same_logits(self, tmp_path):
        run = on_bert("flylora", top_k=2, selection="value", dropout=0.1)
        for router in run.routers.values():
            router.load_bias.normal_()
        run.export(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["flylora.json", "trained.safetensors"]
        loaded = load(tiny_bert(), tmp_path)
        torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0, atol=0)
        tensors = load_file(tmp_path / "trained.safetensors")
        assert run.stored_bytes() == sum(4 * value.numel() for value in tensors.values())

    def test_layers_of_other_ranks_and_a_cut_are_kept(self, tmp_path):
        run = on_bert("flylora", components=7)
        with run.at_rank(1):
            cut = logits(run.model)
            run.export(tmp_path)
        assert run.ranks() == dict(zip(LAYERS, (4, 3), strict=True))
        assert torch.equal(logits(load(tiny_bert(), tmp_path)), cut)
        assert not torch.allclose(logits(run.model), cut, atol=1e-3)

    def test_stock_peft_cannot_hold_it(self, tmp_path):
        run = on_bert("flylora", top_k=2)
        with pytest.raises(ValueError, match="flylora is no LoRA: what a token is given depends on the token"):
            run.scaled_pairs()
        run.export(tmp_path)
        assert type(run.method).singular_values(tmp_path) == {}
        assert run.method.peft_form(run.ranks()) is None
        assert "nothing that stock PEFT could hold" in "".join(type(run.method).details())

    @pytest.mark.parametrize("file", ["flylora.json", "trained.safetensors"])
    @pytest.mark.parametrize("spoil", [changed_byte, lambda path: path.unlink()], ids=["changed", "gone"])
    def test_a_damaged_export_is_told(self, file, spoil, tmp_path):
        on_bert("flylora").export(tmp_path)
        spoil(tmp_path / file)
        with pytest.raises(InputError, match=rf"holds no exported flylora adapter[^\n]*{file}[^\n]*$"):
            load(tiny_bert(), tmp_path)

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (lambda: tiny_bert(8), r"'bert.*' is \(6, 16\), not \(6, 8\)"),
            (lambda: tiny_bert(num_labels=4), r"'classifier.* is \(3,.*not \(4,"),
            (lambda: nn.Linear(2, 2), f"has no linear layer '{LAYERS[0]}'"),
            (with_a_convolution, f"has no linear layer '{LAYERS[0]}'"),
        ],
        ids=["width", "labels", "another", "convolution"],
    )
    def test_another_model_is_told(self, model, reason, tmp_path):
        on_bert("flylora").export(tmp_path)
        with pytest.raises(InputError, match=f"does not fit the model.*{reason}"):
            load(model(), tmp_path)


def test_a_cut_keeps_the_components_with_the_largest_products_of_norms():
    run = on_bert("flylora", rank=3, top_k=1, target_modules=["query"])
    B, A = run.layers[LAYERS[0]].lora_B["default"].weight, run.routers[LAYERS[0]].weight
    with torch.no_grad():
        B.fill_(1.0)
    A.copy_(torch.tensor([1.0, 3.0, 2.0])[:, None].expand(3, 16))
    with run.at_rank(2):
        assert B.any(0).tolist() == [False, True, True]
    assert B.all()


def test_a_dry_run_tells_what_a_token_uses():
    backbone = Backbone(tiny_bert(), (), LAYERS)
    (told,) = flylora(components=17, top_k=3).notes(backbone, TrainSpec(), 100)
    assert told.startswith("a token uses 3 of 8 or 3 of 9 components of a layer, 17 in 2 layers; ")
    assert told.endswith("nothing that stock PEFT could hold")
    (told,) = flylora(rank=8, top_k=8).notes(backbone, TrainSpec(), 100)
    assert told == "a token uses 8 of 8 components of a layer, 16 in 2 layers"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("", "rank = 32 is above the smaller side of layer"),
        ("rank=4,top_k=5", "top_k = 5 is above the 4 components of layer"),
        ("components=25,top_k=3", "top_k = 3 is above the 2 components of layer"),
        ("components=11", "components = 11 should be 12 to 192"),
        ("rank=4,selection=sign", "flylora.selection = 'sign' is not allowed"),
        ("rank=4,balance_step=-1", "flylora.balance_step = -1 is not allowed"),
        ("rank=4,optimizer=galore", "unknown parameter of flylora 'optimizer'"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"flylora[{settings}]" if settings else "flylora", message, tmp_path, capsys)


def test_a_convolution_is_a_reason():
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4))
    told = flylora().unsupported(Backbone(module, (), ("0", "2")))
    assert told == "a choice for every token is for linear layers, and layer '0' is a convolution"
    assert flylora(rank=2, target_modules=["2"]).unsupported(Backbone(module, (), ("0", "2"))) is None
