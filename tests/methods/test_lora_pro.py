"""LoRA-Pro: corrected gradients against slow references, both modes step by step, full rank as full fine-tuning."""

import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.linalg import solve_sylvester

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.errors import Diverged
from harness.method import Backbone
from harness.passes import taking_weight_gradients
from harness.run import checkpoint
from harness.spec import TrainSpec
from methods.lora_pro import corrected
from tests.support.network import KINDS, Network, method_training
from tests.support.refusals import assert_refused
from tests.support.small_lora import assert_export_is_stock_lora

SETTINGS = "rank=3,mode=efficient,solution=symmetry,dropout=0.1,rslora=true,weight_decay=0.1,learning_rate=3e-3"
SOLUTIONS = ("sylvester", "symmetry", "zero")
SHAPES = ((9, 7), (5, 12), (6, 6))
RATE, DECAY = 1e-2, 0.1


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With other settings than those that every method is tried with."""
    contract(Subject(f"lora_pro[{SETTINGS}]", tmp_path))


def lora_pro(**settings):
    return registry.make_method("lora_pro", settings)


def cases(scale=1.5, r=3):
    """Of three layers: G, (B, A) and their gradients."""
    generator, found = torch.Generator().manual_seed(0), []
    for m, n in SHAPES:
        G, B, A = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, n), (m, r), (r, n)))
        found.append((G, (B, A), (scale * G @ A.T, scale * B.T @ G)))
    return found


def correct(found, scale=1.5, solution="sylvester", damping=0.0):
    return corrected([pair for _, pair, _ in found], [each for _, _, each in found], scale, solution, damping)


def projections(B, A):
    """P_B onto the columns of B and P_A onto the rows of A, by NumPy's pseudo-inverse."""
    return B @ np.linalg.pinv(B), np.linalg.pinv(A) @ A


def by_hand(G, B, A, scale, solution="sylvester"):
    """(g_B', g_A') of a full-rank pair as the paper writes them, in NumPy."""
    g_B, g_A, s = scale * G @ A.T, scale * B.T @ G, scale
    of_B, of_A = np.linalg.inv(B.T @ B), np.linalg.inv(A @ A.T)
    X = {
        "zero": np.zeros((len(A), len(A))),
        "symmetry": -of_B @ B.T @ g_B @ of_A / (2 * s**2),
        "sylvester": solve_sylvester(B.T @ B, A @ A.T, -of_B @ g_A @ A.T / s**2),
    }[solution]
    rest = np.eye(len(B)) - B @ of_B @ B.T
    return rest @ g_B @ of_A / s**2 - B @ X, of_B @ g_A / s**2 + X @ A


class TestCorrected:
    @pytest.mark.parametrize("solution", SOLUTIONS)
    def test_the_equivalent_gradient_is_the_projection_whatever_x_is(self, solution):
        found = cases()
        for (G, (B, A), _), (g_B, g_A) in zip(found, correct(found, solution=solution), strict=True):
            P_B, P_A = projections(B.numpy(), A.numpy())
            expected = P_B @ G.numpy() + (np.eye(len(P_B)) - P_B) @ G.numpy() @ P_A
            np.testing.assert_allclose((1.5 * (B @ g_A + g_B @ A)).numpy(), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("solution", SOLUTIONS)
    def test_they_are_the_papers(self, solution):
        found = cases()
        for (G, (B, A), _), (g_B, g_A) in zip(found, correct(found, solution=solution), strict=True):
            expected_B, expected_A = by_hand(G.numpy(), B.numpy(), A.numpy(), 1.5, solution)
            np.testing.assert_allclose(g_B.numpy(), expected_B, rtol=0, atol=1e-11)
            np.testing.assert_allclose(g_A.numpy(), expected_A, rtol=0, atol=1e-11)

    def test_no_change_of_both_factors_comes_nearer_to_the_gradient(self):
        found = cases()
        for (G, (B, A), _), (g_B, g_A) in zip(found, correct(found), strict=True):
            (m, n), r = G.shape, len(A)
            # vec(B M) and vec(N A), row by row
            system = 1.5 * np.hstack([np.kron(B, np.eye(n)), np.kron(np.eye(m), A.T)])
            best, *_ = np.linalg.lstsq(system, G.numpy().reshape(-1), rcond=None)
            reached = (system @ best).reshape(m, n)
            np.testing.assert_allclose((1.5 * (B @ g_A + g_B @ A)).numpy(), reached, rtol=0, atol=1e-11)
            assert r * (m + n) - r * r < m * n  # which is not all of it

    def test_sylvester_is_nearest_to_the_gradients_of_lora(self):
        """Of all X, by least squares."""
        found, zero = cases(), correct(cases(), solution="zero")
        for (_, (B, A), (g_B, g_A)), (new_B, new_A), (own_B, own_A) in zip(found, correct(found), zero, strict=True):
            r = len(A)
            system = np.vstack([-np.kron(B, np.eye(r)), np.kron(np.eye(r), A.T)])
            wanted = np.concatenate([(g_B - own_B).numpy().reshape(-1), (g_A - own_A).numpy().reshape(-1)])
            X = torch.from_numpy(np.linalg.lstsq(system, wanted, rcond=None)[0].reshape(r, r))
            torch.testing.assert_close(new_A, own_A + X @ A, rtol=0, atol=1e-11)
            torch.testing.assert_close(new_B, own_B - B @ X, rtol=0, atol=1e-11)
            assert X.norm() > 1e-2

    def test_symmetry_has_both_factors_make_half_of_what_both_can(self):
        found = cases()
        for (G, (B, A), _), (g_B, g_A) in zip(found, correct(found, solution="symmetry"), strict=True):
            P_B, P_A = (torch.from_numpy(each) for each in projections(B.numpy(), A.numpy()))
            half = P_B @ G @ P_A / 2
            torch.testing.assert_close(1.5 * B @ g_A @ P_A, half, rtol=0, atol=1e-12)
            torch.testing.assert_close(1.5 * P_B @ g_B @ A, half, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("damping", [0.0, 1e-8])
    @pytest.mark.parametrize("solution", SOLUTIONS)
    def test_the_first_step_at_b_zero(self, solution, damping):
        found = [(G, (0 * B, A), (g_B, 0 * g_A)) for G, (B, A), (g_B, g_A) in cases()]
        for (_, (_, A), (g_B, _)), (new_B, new_A) in zip(
            found, correct(found, solution=solution, damping=damping), strict=True
        ):
            expected = g_B.numpy() @ np.linalg.inv(A.numpy() @ A.numpy().T) / 1.5**2
            np.testing.assert_allclose(new_B.numpy(), expected, rtol=0, atol=1e-12 + 10 * damping)
            assert not new_A.any()

    @pytest.mark.parametrize("solution", SOLUTIONS)
    def test_factors_without_full_rank_have_their_projections(self, solution):
        """A component that is nothing, and two that are one."""
        found = []
        for G, (B, A), _ in cases():
            B, A = B.clone(), A.clone()
            B[:, 1], A[2] = 0, A[0]
            found.append((G, (B, A), (1.5 * G @ A.T, 1.5 * B.T @ G)))
        for (G, (B, A), _), (g_B, g_A) in zip(found, correct(found, solution=solution), strict=True):
            P_B, P_A = projections(B.numpy(), A.numpy())
            expected = P_B @ G.numpy() + (np.eye(len(P_B)) - P_B) @ G.numpy() @ P_A
            np.testing.assert_allclose((1.5 * (B @ g_A + g_B @ A)).numpy(), expected, rtol=0, atol=1e-11)

    def test_damping_bounds_what_a_short_b_gives_a(self):
        """(b^2 + d)^-1 b is at most 1 / (2 sqrt(d)); without it a corrected gradient is as long as B is short."""
        found = [(G, (1e-9 * B, A), (g_B, 1e-9 * g_A)) for G, (B, A), (g_B, g_A) in cases()]
        for (G, _, _), (_, damped), (_, free) in zip(
            found, correct(found, solution="zero", damping=1e-8), correct(found, solution="zero"), strict=True
        ):
            assert damped.norm() <= G.norm() / 1.5 / (2 * 1e-4)
            assert free.norm() > 1e7

    def test_single_precision_is_solved_in_double(self):
        found = cases()
        for G, (B, _), _ in found:
            B[:, 0] *= 1e-5
            assert G.dtype == torch.float64
        found = [(G, (B, A), (1.5 * G @ A.T, 1.5 * B.T @ G)) for G, (B, A), _ in found]
        single = [(G, (B.float(), A.float()), (g[0].float(), g[1].float())) for G, (B, A), g in found]
        for exact, rounded in zip(correct(found), correct(single), strict=True):
            for one, two in zip(exact, rounded, strict=True):
                assert two.dtype == torch.float32
                torch.testing.assert_close(two.double(), one, rtol=0, atol=1e-4 * float(one.abs().max()))


def steps(training, updates):
    """So many updates without clipping: for each (B, A), their gradients, and what came of them, by layer."""
    training.train = training.train.model_copy(update={"clip_norm": 0.0})
    adaptation, found, seen = training.adaptation, [], {}

    def values():
        return {
            name: tuple(
                getattr(layer, part)["default"].weight.detach().flatten(1).clone() for part in ("lora_B", "lora_A")
            )
            for name, layer in adaptation.layers.items()
        }

    def note(step):
        for name, layer in adaptation.layers.items():
            seen[name] = tuple(
                getattr(layer, part)["default"].weight.grad.flatten(1).clone() for part in ("lora_B", "lora_A")
            )

    adaptation.before_step = note
    for _ in range(updates):
        before = values()
        training.update()
        found.append((before, dict(seen), values()))
    return found


class TestEfficient:
    def test_adamw_gets_the_corrected_gradients(self):
        training = method_training(lora_pro(rank=2, mode="efficient", learning_rate=RATE, weight_decay=DECAY))
        scale, optimizers = training.adaptation.method.scale, {}
        for before, gradients, after in steps(training, 4):
            for name, pair in before.items():
                own, optimizer = optimizers.setdefault(
                    name,
                    (
                        made := [p.clone().requires_grad_() for p in pair],
                        torch.optim.AdamW(made, RATE, weight_decay=DECAY),
                    ),
                )
                (new,) = corrected([pair], [gradients[name]], scale, "sylvester", 1e-8)
                for parameter, gradient in zip(own, new, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                for parameter, found in zip(own, after[name], strict=True):
                    torch.testing.assert_close(parameter.detach(), found, rtol=0, atol=1e-10)

    def test_the_step_of_every_kind_of_layer_is_the_weights_own_projected(self):
        """G by the frozen weight's own gradient: with kernels, and with transposed weights."""
        training = method_training(lora_pro(rank=2, mode="efficient", damping=0.0, learning_rate=RATE))
        steps(training, 2)
        adaptation, scale, found = training.adaptation, training.adaptation.method.scale, {}
        layers = {name: layer.get_base_layer() for name, layer in adaptation.layers.items()}
        pairs = {name: (B / scale, A) for name, (B, A) in adaptation.scaled_pairs().items()}
        seen = {}

        def look(optimizer, args, kwargs):
            for name, layer in adaptation.layers.items():
                seen[name] = (
                    layer.lora_B["default"].weight.grad.flatten(1),
                    layer.lora_A["default"].weight.grad.flatten(1),
                )

        adaptation.optimizer.register_step_pre_hook(look)
        pairs = {name: tuple(factor.flatten(1).clone() for factor in pair) for name, pair in pairs.items()}
        with taking_weight_gradients(layers, lambda name, gradient: found.update({name: gradient})):
            training.update()
        assert seen.keys() == found.keys() == set(KINDS)
        for name, (g_B, g_A) in seen.items():
            (B, A), G = pairs[name], found[name].numpy()
            P_B, P_A = projections(B.numpy(), A.numpy())
            expected = P_B @ G + (np.eye(len(G)) - P_B) @ G @ P_A
            np.testing.assert_allclose((scale * (B @ g_A + g_B @ A)).numpy(), expected, rtol=0, atol=1e-12)

    def test_moments_are_as_small_as_the_factors(self):
        training = method_training(lora_pro(rank=2, mode="efficient"))
        training.update()
        for layer in training.adaptation.layers.values():
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                assert training.adaptation.optimizer.state[factor]["exp_avg"].shape == factor.shape


class TestFull:
    @pytest.mark.parametrize("solution", SOLUTIONS)
    def test_every_step_is_that_of_the_equivalent_gradients_moments(self, solution):
        method = lora_pro(rank=2, solution=solution, damping=0.0, learning_rate=RATE, weight_decay=DECAY)
        training = method_training(method)
        s, moments = method.scale, {}
        for number, (before, gradients, after) in enumerate(steps(training, 4), 1):
            for name, pair in before.items():
                (B, A), (g_B, g_A) = ([each.numpy() for each in both] for both in (pair, gradients[name]))
                P_B, _ = projections(B, A)
                equivalent = np.linalg.pinv(B).T @ g_A / s + (np.eye(len(B)) - P_B) @ g_B @ np.linalg.pinv(A).T / s
                m, v = moments.get(name, (0.0, 0.0))
                m, v = moments[name] = 0.9 * m + 0.1 * equivalent, 0.999 * v + 0.001 * equivalent**2
                direction = m / (1 - 0.9**number) / (np.sqrt(v / (1 - 0.999**number)) + 1e-8)
                if number == 1:  # B = 0
                    d_B, d_A = direction @ np.linalg.pinv(A) / s, 0 * A
                else:
                    d_B, d_A = by_hand(direction, B, A, s, solution)
                decay = math.sqrt(1 - RATE * DECAY)
                np.testing.assert_allclose(after[name][0].numpy(), decay * B - RATE * d_B, rtol=0, atol=1e-9)
                np.testing.assert_allclose(after[name][1].numpy(), decay * A - RATE * d_A, rtol=0, atol=1e-9)

    def test_at_full_rank_the_first_step_is_that_of_full_fine_tuning(self):
        """Of its inputs: with B = 0, A sees all of the gradient."""
        runs = {}
        for method in (
            lora_pro(rank=4, damping=0.0, learning_rate=RATE),
            registry.make_method("full", {"learning_rate": RATE, "weight_decay": 0.0}),
        ):
            runs[type(method).__name__] = training = method_training(method, ("small",), module=Small)
            training.update()
        layer = runs["LoraPro"].adaptation.layers["small"]
        own = layer.get_base_layer().weight + layer.get_delta_weight("default")
        full = runs["Full"].adaptation.model.small.weight
        torch.testing.assert_close(own.detach(), full.detach(), rtol=0, atol=1e-10)
        assert (full - layer.get_base_layer().weight).abs().max() > 0.9 * RATE

    def test_moments_are_as_large_as_the_weights(self):
        training = method_training(lora_pro(rank=2))
        training.update()
        state = training.adaptation.optimizer.state
        for layer in training.adaptation.layers.values():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert state[B]["exp_avg"].shape == state[B]["exp_avg_sq"].shape == (len(B), A[0].numel())
            assert A not in state


class Small(torch.nn.Module):
    """Images (rows, 2, 6, 6), of which a layer sees four numbers."""

    def __init__(self):
        super().__init__()
        self.small = torch.nn.Linear(4, 7)
        self.head = torch.nn.Linear(7, 3)

    def forward(self, images):
        return self.head(torch.tanh(self.small(images.flatten(1)[:, :4])))


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_a_long_correction_does_not_cut_the_heads_gradient(mode, tmp_path):
    """What is clipped are LoRA's gradients."""
    norms = []
    for name in (f"lora_pro[rank=4,mode={mode}]", "lora[rank=4]"):
        run = start(Subject(name, tmp_path))
        run.training.update()
        run.training.fetch()
        norms.append(run.training.history[0]["gradient_norm"])
    assert norms[0] == norms[1] > 0


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_an_export_is_a_stock_lora(mode, tmp_path):
    run = start(Subject(f"lora_pro[rank=4,mode={mode}]", tmp_path))
    run.training.run(lambda training: None)
    assert_export_is_stock_lora(run, tmp_path / "export")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # of layers of both kinds
@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_every_kind_of_layer_resumes_and_is_exported(mode, tmp_path):
    """Of a kernel, moments have the shape of neither factor."""
    whole, resumed = (method_training(lora_pro(rank=2, mode=mode)) for _ in range(2))
    for _ in range(5):
        whole.update()
    checkpoint.save(tmp_path / "checkpoint", 5, whole.state_dict())
    resumed.load_state_dict(checkpoint.load_newest(tmp_path / "checkpoint").state)
    for training in (whole, resumed):
        training.run(lambda training: None)
    assert whole.history == resumed.history
    for name, pair in whole.adaptation.scaled_pairs().items():
        assert all(map(torch.equal, pair, resumed.adaptation.scaled_pairs()[name]))
    whole.adaptation.export(tmp_path / "export")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Network().eval().double(), str(tmp_path / "export")).eval().double()
    images = whole.encoded.inputs["images"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), whole.adaptation.model(images), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_factors_that_are_not_finite_are_a_divergence(mode):
    """LAPACK, which does not always say so, does here."""
    training = method_training(lora_pro(rank=4, mode=mode))
    training.adaptation.layers["linear"].lora_A["default"].weight.data[0, 0] = math.nan
    with pytest.raises(Diverged, match="B and A of a layer are not finite"):
        training.update()


def test_a_layer_that_no_loss_reaches_stays():
    training = method_training(lora_pro(rank=2), layers=("linear", "unused"))
    before = [p.detach().clone() for p in training.adaptation.layers["unused"].parameters()]
    training.update()
    assert all(
        torch.equal(p, q) for p, q in zip(before, training.adaptation.layers["unused"].parameters(), strict=True)
    )
    alone = method_training(lora_pro(rank=2), layers=("unused",))
    alone.update()


def test_advice_is_a_lora_of_this_rank():
    form = lora_pro(rank=2, alpha=8.0).peft_form({"a": 2, "b": 2})
    assert (form.method, form.parameters["rank"], form.parameters["rank_pattern"]) == ("lora", 2, {})
    assert form.config["lora_alpha"] / form.config["r"] == 4


def test_a_dry_run_tells_the_memory_of_whole_moments():
    backbone = Backbone(torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.Linear(256, 512)), (), ("0", "1"))
    notes = lora_pro().notes(backbone, TrainSpec(batches=40), 100)
    assert notes == ["AdamW's moments are those of whole matrices: 2.0 MiB for 2 layers"]
    assert lora_pro(mode="efficient").notes(backbone, TrainSpec(batches=40), 100) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("mode=fast", "lora_pro.mode = 'fast' is not allowed"),
        ("solution=best", "lora_pro.solution = 'best' is not allowed"),
        ("damping=-1", "lora_pro.damping = -1"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"lora_pro[{settings}]", message, tmp_path, capsys, "--batches", "6")


def test_what_does_not_fit_a_backbone_is_a_reason():
    grouped = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    assert "groups" in lora_pro(rank=2).unsupported(Backbone(grouped, (), ("0",)))
