"""Queryable LoRA: what a token mixes and by which query, LoRA as its limit, its own files."""

import numpy as np
import pytest
import torch
from torch import nn

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.errors import InputError
from harness.method import Backbone
from harness.spec import TrainSpec
from methods.queryable_lora import load
from tests.support.refusals import assert_refused
from tests.support.small_lora import assert_export_is_stock_lora
from tests.support.trained import trained

SETTINGS = "rank=4,atoms=5,top_k=3,components=30,dropout=0.1,spread=0.5"
LAYERS = ("first", "second", "third")


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With other settings than those that every method is tried with."""
    contract(Subject(f"queryable_lora[{SETTINGS}]", tmp_path))


def queryable(**settings):
    return registry.make_method("queryable_lora", settings)


class Tokens(nn.Module):
    """(examples, tokens, 6) to (examples, tokens, 5), linear layers with tanh between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def on_tokens(**settings):
    """A run on three layers in float64, with random pairs; 7 components are 3 in the first and 2 in the others."""
    torch.manual_seed(0)
    method = queryable(**{"components": 7, "atoms": 4, "spread": 0.7} | settings)
    backbone = Backbone(Tokens().double(), (), LAYERS)
    adaptation = method.start(backbone, TrainSpec(batches=1), None, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in adaptation.layers.values():
            layer.lora_A["default"].weight.normal_()
            layer.lora_B["default"].weight.normal_()
    return adaptation


def tokens():
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def bank_of(adaptation):
    return adaptation.model.get_submodule("base_model.model.update_atoms")


def by_hand(adaptation, x):
    """One token, (6,), through all layers: the output and C of each layer, from the page's equations."""
    bank = bank_of(adaptation)
    M, K, Q = (p.detach().numpy() for p in (bank.atoms, bank.keys, bank.query))
    most, states, used = Q.shape[0], [], []
    for name in LAYERS:
        layer = adaptation.layers[name]
        A, B = (factors["default"].weight.detach().numpy() for factors in (layer.lora_A, layer.lora_B))
        base = layer.get_base_layer()
        z, r = A @ x, len(A)
        summary = np.mean(states, 0) if states else np.zeros(most)
        query = Q @ np.concatenate([z, np.zeros(most - r), summary])
        logits = K @ query / np.sqrt(most)
        best = np.argsort(logits)[-bank.chosen :]
        weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
        C = sum(w * M[i] for w, i in zip(weights, best, strict=True))[:r, :r]
        states.append(np.concatenate([C @ z, np.zeros(most - r)]))
        used.append(C)
        x = base.weight.detach().numpy() @ x + base.bias.detach().numpy() + layer.scaling["default"] * B @ (C @ z)
        x = np.tanh(x) if name != "third" else x
    return x, used


class TestMixture:
    @pytest.mark.parametrize("top_k", [2, 3, 4])
    def test_every_token_against_the_equations(self, top_k):
        adaptation = on_tokens(top_k=top_k)
        with torch.no_grad():
            found = adaptation.model(tokens())
        for place in np.ndindex(2, 3):
            wanted, _ = by_hand(adaptation, tokens()[place].numpy())
            np.testing.assert_allclose(found[place].numpy(), wanted, rtol=0, atol=1e-12)

    def test_tokens_are_given_different_mixtures_and_that_changes_the_result(self):
        """A fixed mixture, the mean of what the tokens have, gives another update; a LoRA is linear in the token."""
        adaptation = on_tokens()
        cores = [by_hand(adaptation, x.numpy())[1][0] for x in tokens().flatten(0, 1)]
        assert min(np.abs(one - other).max() for i, one in enumerate(cores) for other in cores[:i]) > 1e-3
        layer = adaptation.layers["first"]
        A, B = (factors["default"].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        fixed = tokens() @ (layer.scaling["default"] * B @ torch.from_numpy(np.mean(cores, 0)) @ A).T
        with torch.no_grad():
            update = layer(tokens()) - layer.get_base_layer()(tokens())
        assert (update - fixed).abs().max() > 0.1 * update.abs().max()

    @pytest.mark.parametrize(("atoms", "is_linear"), [(1, True), (4, False)])
    def test_the_update_is_linear_in_a_token_with_one_atom_alone(self, atoms, is_linear):
        layer = on_tokens(atoms=atoms).layers["first"]
        x, y = tokens().flatten(0, 1)[:2]
        with torch.no_grad():
            one, other, both = (layer(each) - layer.get_base_layer()(each) for each in (x, y, x + y))
        assert torch.allclose(one + other, both, atol=1e-10) == is_linear

    def test_the_mixture_is_convex(self):
        """Of atoms that are all alike it is that atom, whatever the query is."""
        adaptation, same = on_tokens(), torch.randn(3, 3, dtype=torch.float64)
        bank = bank_of(adaptation)
        z = torch.randn(9, 3, dtype=torch.float64)
        with torch.no_grad():
            bank.atoms.copy_(same)
            torch.testing.assert_close(bank(z)[0], z @ same.T, rtol=0, atol=1e-12)


class TestSummary:
    def test_what_a_layer_mixes_depends_on_the_layers_before(self):
        adaptation = on_tokens()
        seen = {}
        second = adaptation.layers["second"]
        hook = second.register_forward_hook(lambda layer, args, output: seen.update(x=args[0], y=output))
        with torch.no_grad():
            adaptation.model(tokens())
            hook.remove()
            alone = second(seen["x"])  # outside of a forward of the model there is nothing before
        assert (alone - seen["y"]).abs().max() > 1e-2

    def test_it_ends_with_the_forward_even_with_one_that_fails(self):
        adaptation = on_tokens()
        with torch.no_grad():
            wanted = adaptation.model(tokens())
            hook = adaptation.layers["second"].register_forward_pre_hook(lambda layer, args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                adaptation.model(tokens())
            hook.remove()
            first = adaptation.layers["first"]
            assert torch.equal(first(tokens()), first(tokens()))
            assert torch.equal(adaptation.model(tokens()), wanted)

    def test_other_tokens_begin_anew(self):
        bank = bank_of(on_tokens())
        bank.is_in_forward = True
        few, many = (torch.randn(rows, 3, dtype=torch.float64) for rows in (2, 5))
        with torch.no_grad():
            bank(few)
            found = bank(many)[0]
            bank.is_in_forward, bank.before = False, []
            assert torch.equal(found, bank(many)[0])


def losses(started):
    torch.manual_seed(1)
    started.training.run(lambda training: None)
    return [row["loss"] for row in started.training.history]


class TestLimits:
    def test_with_one_atom_it_is_lora(self, tmp_path):
        """Bit for bit, with as many parameters, and exported as one."""
        one = start(Subject("queryable_lora[rank=4,atoms=1]", tmp_path))
        lora = start(Subject("lora[rank=4]", tmp_path))
        assert losses(one) == losses(lora)
        assert one.training.sizes.parameters() == lora.training.sizes.parameters()
        assert_export_is_stock_lora(one, tmp_path / "export")

    def test_with_atoms_that_stay_the_identity_it_is_lora(self, tmp_path):
        """Through the query and the mixture: weights that sum to 1 change nothing then."""
        same = start(Subject("queryable_lora[rank=4,atoms=3,spread=0]", tmp_path))
        bank_of(same.adaptation).atoms.requires_grad_(False)
        lora = start(Subject("lora[rank=4]", tmp_path))
        assert losses(same) == pytest.approx(losses(lora), rel=1e-5)

    def test_atoms_keys_and_query_train(self, tmp_path):
        run = start(Subject("queryable_lora[rank=4]", tmp_path))
        bank = bank_of(run.adaptation)
        before = [p.detach().clone() for p in bank.parameters()]
        run.training.run(lambda training: None)
        assert all((now - then).abs().max() > 1e-4 for now, then in zip(bank.parameters(), before, strict=True))


def test_parameters_are_loras_and_the_shared_ones():
    adaptation = on_tokens()
    pairs = 3 * (6 + 7) + 2 * (7 + 6) + 2 * (6 + 5)
    assert adaptation.adapter_parameters() == pairs + 4 * 9 + 4 * 3 + 3 * 6
    assert adaptation.ranks() == {"first": 3, "second": 2, "third": 2}
    (told,) = queryable(components=7).notes(Backbone(Tokens(), (), LAYERS), TrainSpec(batches=4), 8)
    assert told.startswith("7 components in 3 layers, which share 4 atoms, 66 parameters with keys and query; a token ")


def test_an_export_loads_into_a_new_model(tmp_path):
    run = trained(f"queryable_lora[{SETTINGS}]", tmp_path)
    run.adaptation.export(tmp_path / "export")
    batch = run.task.collate(run.training.encoded, range(8), None)
    found = load(run.before.module, tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(found(**batch.inputs).logits, run.adaptation.model.eval()(**batch.inputs).logits)
    size = (tmp_path / "export" / "trained.safetensors").stat().st_size
    assert run.adaptation.stored_bytes() < size < run.adaptation.stored_bytes() + 8000


def test_an_export_of_another_method_is_told(tmp_path):
    on_tokens().export(tmp_path)
    (tmp_path / "queryable_lora.json").rename(tmp_path / "other.json")
    with pytest.raises(InputError, match="holds no exported queryable_lora adapter that can be read"):
        load(Tokens(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("top_k=5", "top_k = 5 is above atoms = 4"),
        ("top_k=1", "top_k = 1 has a weight of 1 whatever the query is, which would never train: give 2 or more"),
        ("atoms=0", "queryable_lora.atoms = 0 is not allowed"),
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("components=1", "components = 1 should be"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"queryable_lora[{settings}]", message, tmp_path, capsys, "--batches", "6")


def test_a_convolution_is_a_reason():
    convolution = nn.Sequential(nn.Conv2d(4, 4, 3))
    told = queryable(rank=2).unsupported(Backbone(convolution, (), ("0",)))
    assert told == "a choice for every token is for linear layers, and layer '0' is a convolution"
