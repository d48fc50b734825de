"""Full fine-tuning with optimizers that keep less: their mathematics against slow references, their memory."""

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch
from torch import nn

from harness import registry
from harness.contracts import Subject, start
from harness.contracts.methods import (
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    counts_are_right,
    loss_falls_on_a_batch_that_can_be_memorised,
    the_same_seed_gives_the_same_record,
)
from harness.contracts.subject import method_of, spec_of
from harness.method import Backbone
from harness.record.store import RecordStore
from harness.run.run import run_one
from harness.spec import TrainSpec
from methods.full_optimizers.dct_adamw import DctAdamW, carried, cosine_transform
from methods.full_optimizers.frugal import Frugal
from methods.full_optimizers.galore import GaLore
from methods.full_optimizers.matrix_adamw import leading_directions
from tests.support.network import Network
from tests.support.refusals import assert_refused

RATE, DECAY, STEPS = 0.01, 0.1, 7
SHAPES = [(6, 4), (4, 6), (5, 5)]  # tall, wide, square
SETTINGS = [
    "optimizer=galore,rank=3,interval=5,learning_rate=1e-3",
    "optimizer=frugal,interval=5,learning_rate=1e-3",
    "optimizer=frugal,subspace=svd,interval=5,learning_rate=1e-3,kappa=0.5",
    "optimizer=dct_adamw,rank=3,interval=5,error_feedback=true,learning_rate=1e-3",
]
OTHERS = ['optimizer=frugal,target_modules=["query"],learning_rate=1e-3', "optimizer=dct_adamw,learning_rate=1e-3"]
CONTRACTS = [
    loss_falls_on_a_batch_that_can_be_memorised,
    counts_are_right,
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    the_same_seed_gives_the_same_record,
]


def gradients(shape, steps=STEPS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(steps)]


def trained(cls, start, given, *, moments=True, transposed=False, dtype=torch.float64, rng=None, **settings):
    """The weight after a step for each of the gradients, and the optimizer."""
    turn = np.transpose if transposed else np.asarray
    weight = nn.Parameter(torch.tensor(turn(start), dtype=dtype).contiguous())
    group = {"params": [weight], "weight_decay": DECAY, "transposed": transposed, "moments": moments}
    optimizer = cls([group], RATE, **settings)
    for gradient in given:
        optimizer.rng = rng
        weight.grad = torch.tensor(turn(gradient), dtype=dtype).contiguous()
        optimizer.step()
    return turn(weight.detach().numpy()), optimizer


def adam_of(given, state, factor=1.0):
    """Adam's direction by the paper's formula; `state` holds m, v and t."""
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * given
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * given**2
    return factor * (state["m"] / (1 - 0.9 ** state["t"])) / (np.sqrt(state["v"] / (1 - 0.999 ** state["t"])) + 1e-8)


def stepped(weight, direction):
    return (1 - RATE * DECAY) * weight - RATE * direction


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def rotated_adam(start, given, turn, back):
    """AdamW, torch's own, on the weight and the gradients in another basis."""
    weight = nn.Parameter(torch.tensor(np.ascontiguousarray(turn(start))))
    optimizer = torch.optim.AdamW([weight], lr=RATE, weight_decay=DECAY, foreach=False)
    for gradient in given:
        weight.grad = torch.tensor(np.ascontiguousarray(turn(gradient)))
        optimizer.step()
    return back(weight.detach().numpy())


def right_basis(gradient):
    """All right singular vectors of a tall matrix, by NumPy."""
    return np.linalg.svd(gradient, full_matrices=False)[2].T


def on_smaller_side(shape):
    """How a matrix is turned so that it is tall."""
    return np.asarray if shape[0] >= shape[1] else np.transpose


@pytest.mark.parametrize("shape", SHAPES)
class TestAllDirectionsAreAdamInAnotherBasis:
    def test_galore(self, shape):
        given, tall = gradients(shape), on_smaller_side(shape)
        basis = right_basis(tall(given[0]))
        expected = rotated_adam(given[0], given, lambda x: tall(x) @ basis, lambda x: tall(x @ basis.T))
        found, _ = trained(GaLore, given[0], given, rank=min(shape), interval=STEPS, scale=1.0)
        assert_close(found, expected)

    @pytest.mark.parametrize("interval", [1, 3])
    def test_dct(self, shape, interval):
        """Also when columns are chosen again: all are kept, in their order."""
        given, tall = gradients(shape), on_smaller_side(shape)
        expected = rotated_adam(
            given[0],
            given,
            lambda x: scipy.fft.dct(tall(x), type=3, norm="ortho", axis=1),
            lambda x: tall(scipy.fft.dct(x, type=2, norm="ortho", axis=1)),
        )
        settings = {"rank": min(shape), "interval": interval, "selection": "l1", "error_feedback": False}
        assert_close(trained(DctAdamW, given[0], given, **settings)[0], expected)

    def test_frugal_along_singular_vectors(self, shape):
        """The rest is rounding then: its sign, a whole step of signSGD, must not be made."""
        given, tall = gradients(shape), on_smaller_side(shape)
        basis = right_basis(tall(given[0]))
        expected = rotated_adam(given[0], given, lambda x: tall(x) @ basis, lambda x: tall(x @ basis.T))
        settings = {"density": 1.0, "interval": STEPS, "kappa": 1.0, "subspace": "svd"}
        assert_close(trained(Frugal, given[0], given, **settings)[0], expected)

    def test_frugal_in_columns_is_adamw(self, shape):
        given = gradients(shape)
        expected = rotated_adam(given[0], given, np.asarray, np.asarray)
        settings = {"density": 1.0, "interval": STEPS, "kappa": 1.0, "subspace": "columns"}
        assert_close(trained(Frugal, given[0], given, **settings)[0], expected)


@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstTheFormulas:
    def test_galore_keeps_its_moments_when_the_basis_changes(self, shape):
        given, tall, weight, state = gradients(shape), on_smaller_side(shape), gradients(shape)[0], {}
        for i, gradient in enumerate(given):
            if i % 3 == 0:
                turned = torch.tensor(tall(gradient).copy(order="K"))
                basis = leading_directions(turned, 2).numpy()  # signs of singular vectors are the library's choice
            weight = stepped(weight, tall(adam_of(tall(gradient) @ basis, state, 4.0) @ basis.T))
        assert_close(trained(GaLore, given[0], given, rank=2, interval=3, scale=4.0)[0], weight)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_frugal_begins_anew_in_other_columns(self, shape, transposed):
        given, weight, drawn = gradients(shape), gradients(shape)[0], torch.Generator().manual_seed(3)
        for i, gradient in enumerate(given):
            if i % 3 == 0:
                columns, state = torch.randperm(shape[1], generator=drawn)[: round(0.5 * shape[1])].numpy(), {}
            direction = 0.1 * np.sign(gradient)
            direction[:, columns] = adam_of(gradient[:, columns], state)
            weight = stepped(weight, direction)
        settings = {"density": 0.5, "interval": 3, "kappa": 0.1, "subspace": "columns", "transposed": transposed}
        found, _ = trained(Frugal, given[0], given, rng=torch.Generator().manual_seed(3), **settings)
        assert_close(found, weight)

    def test_frugal_along_singular_vectors(self, shape):
        given, tall, weight = gradients(shape), on_smaller_side(shape), gradients(shape)[0]
        for i, gradient in enumerate(map(tall, given)):
            if i % 3 == 0:
                basis, state = right_basis(gradient)[:, : round(0.5 * min(shape))], {}
            rest = gradient - gradient @ basis @ basis.T
            weight = stepped(weight, tall(0.1 * np.sign(rest) + adam_of(gradient @ basis, state) @ basis.T))
        settings = {"density": 0.5, "interval": 3, "kappa": 0.1, "subspace": "svd"}
        assert_close(trained(Frugal, given[0], given, **settings)[0], weight)

    @pytest.mark.parametrize(("density", "moments"), [(0.0, True), (0.5, False)])
    def test_frugal_without_columns_is_sign_sgd(self, shape, density, moments):
        given, weight = gradients(shape), gradients(shape)[0]
        for gradient in given:
            weight = stepped(weight, 0.1 * np.sign(gradient))
        settings = {"density": density, "interval": 3, "kappa": 0.1, "subspace": "columns", "moments": moments}
        found, optimizer = trained(Frugal, given[0], given, **settings)
        assert_close(found, weight)
        assert not any(
            isinstance(value, torch.Tensor) for state in optimizer.state.values() for value in state.values()
        )

    @pytest.mark.parametrize("error_feedback", [False, True])
    @pytest.mark.parametrize("order", [1, 2])
    def test_dct_rotates_its_moments(self, shape, order, error_feedback):
        given, tall, weight = gradients(shape), on_smaller_side(shape), gradients(shape)[0]
        transform, state, error, before = scipy.fft.dct(np.eye(min(shape)), type=3, norm="ortho", axis=1), {}, 0.0, None
        for i, gradient in enumerate(map(tall, given)):
            gradient = gradient + error
            if i % 2 == 0:
                norms = np.linalg.norm(gradient @ transform, ord=order, axis=0)
                basis = transform[:, np.sort(np.argsort(-norms)[:2])]
                if before is not None:
                    state["m"], state["v"] = state["m"] @ (before.T @ basis), np.abs(state["v"] @ (before.T @ basis))
                before = basis
            error = gradient - gradient @ basis @ basis.T if error_feedback else 0.0
            weight = stepped(weight, tall(adam_of(gradient @ basis, state) @ basis.T))
        settings = {"rank": 2, "interval": 2, "selection": f"l{order}", "error_feedback": error_feedback}
        found, _ = trained(DctAdamW, given[0], given, **settings)
        np.testing.assert_allclose(found, weight, rtol=1e-6)  # what is 1e-17 in the product is 0 in the copy

    def test_a_gradients_norm_is_that_of_its_parts(self, shape):
        (gradient,) = gradients(shape, 1)
        settings = {"rank": 2, "interval": 1, "selection": "l1", "error_feedback": True}
        _, optimizer = trained(DctAdamW, gradient, [gradient], **settings)
        (state,) = optimizer.state.values()
        active, rest = state["exp_avg"].norm() / 0.1, state["error"].norm()
        assert math.isclose(active**2 + rest**2, np.square(gradient).sum(), rel_tol=1e-12)
        assert min(active, rest) > 0.1
        _, optimizer = trained(GaLore, gradient, [gradient], rank=2, interval=1, scale=1.0)
        (state,) = optimizer.state.values()
        assert_close(state["basis"].T @ state["basis"], np.eye(2))
        kept = np.linalg.svd(gradient, compute_uv=False)[:2]
        assert math.isclose(state["exp_avg"].norm() / 0.1, np.linalg.norm(kept), rel_tol=1e-12)


class TestCosineTransform:
    @pytest.mark.parametrize("size", [1, 2, 7, 16])
    def test_it_is_orthogonal_and_the_transform_of_type_three(self, size):
        found = cosine_transform(size).numpy()
        assert_close(found @ found.T, np.eye(size))
        assert_close(found, scipy.fft.dct(np.eye(size), type=3, norm="ortho", axis=1))

    def test_l2_keeps_the_most_of_a_gradient_and_l1_need_not(self):
        for seed, order in itertools.product(range(8), (1, 2)):
            (gradient,) = gradients((5, 4), 1, seed)
            gradient[0] *= 5
            settings = {"rank": 2, "interval": 1, "selection": f"l{order}", "error_feedback": True}
            (state,) = trained(DctAdamW, gradient, [gradient], **settings)[1].state.values()
            squares = np.square(gradient @ cosine_transform(4).numpy()).sum(0)
            most = max(sum(squares[list(pair)]) for pair in itertools.combinations(range(4), 2))
            kept = np.square(gradient).sum() - state["error"].square().sum().item()
            if order == 2:
                assert math.isclose(kept, most, rel_tol=1e-12)
            elif kept < 0.99 * most:
                return
        raise AssertionError("the sum of absolute values chose as squares do in all cases")

    def test_a_rotation_copies_the_columns_that_stay(self):
        before, now, transform = torch.tensor([1, 3, 4]), torch.tensor([0, 3, 5]), cosine_transform(6)
        moment = torch.arange(6.0, dtype=torch.float64).reshape(2, 3) + 1
        rotation = transform[:, before].T @ transform[:, now]
        torch.testing.assert_close(carried(moment, before, now), moment @ rotation)
        assert torch.equal(carried(moment, before, now)[:, 1], moment[:, 1])
        assert torch.equal(carried(moment, before, before), moment)


def started(tmp_path, settings, **subject):
    return start(Subject(f"full[{settings}]", tmp_path, **subject))


class TestARun:
    @pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_contracts(self, settings, contract, tmp_path):
        contract(Subject(f"full[{settings}]", tmp_path, batches=12))

    @pytest.mark.parametrize("settings", OTHERS)
    def test_other_settings_resume_too(self, settings, tmp_path):
        subject = Subject(f"full[{settings}]", tmp_path, batches=8)
        a_run_interrupted_after_every_update_equals_the_uninterrupted_one(subject)

    def test_frugal_at_full_density_is_full_with_adamw(self, tmp_path):
        losses = []
        for settings in ("", ",optimizer=frugal,kappa=1.0,density=1.0", ",optimizer=frugal,kappa=0.0,density=0.5"):
            training = started(tmp_path, f"learning_rate=1e-3{settings}").training
            training.run(lambda training: None)
            losses.append([row["loss"] for row in training.history])
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
        assert np.abs(np.subtract(losses[0], losses[2])).max() > 1e-4

    @pytest.mark.parametrize("settings", ["optimizer=dct_adamw", "optimizer=frugal"])
    def test_places_of_columns_stay_whole_numbers_in_a_checkpoint(self, settings, tmp_path):
        """In bfloat16, where whole numbers above 256 are not all there, torch would make floats of them."""
        runs = [started(tmp_path, settings, backbone_dtype="bf16").adaptation for _ in range(2)]
        for parameter in runs[0].model.parameters():
            parameter.grad = torch.ones_like(parameter)
        runs[0].optimizer.step()
        runs[1].load_state_dict(runs[0].state_dict())
        kinds = [
            [(n, type(v), getattr(v, "dtype", None)) for s in r.optimizer.state.values() for n, v in s.items()]
            for r in runs
        ]
        assert kinds[0] == kinds[1]
        assert ("columns", torch.Tensor, torch.int64) in kinds[1]

    def test_a_gradient_that_is_not_finite_is_a_run_that_diverged(self, tmp_path):
        store = RecordStore(tmp_path)
        store.make_ready()
        record = run_one(spec_of(Subject("full[optimizer=galore,interval=1,learning_rate=1e38]", tmp_path)), store)
        assert record.status == "diverged", record.error

    def test_gradients_are_there_after_the_step_as_they_were(self, tmp_path):
        adaptation = started(tmp_path, "optimizer=dct_adamw,error_feedback=true").adaptation
        for parameter in adaptation.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        adaptation.optimizer.step()
        adaptation.optimizer.step()
        assert all((parameter.grad == 0.5).all() for parameter in adaptation.model.parameters())

    @pytest.mark.parametrize(
        ("optimizer", "others"), [("galore", "exp_avg"), ("frugal", None), ("dct_adamw", "exp_avg")]
    )
    def test_target_modules(self, optimizer, others, tmp_path):
        """Other linear layers have whole moments, with FRUGAL none; the embeddings, the head and vectors whole ones."""
        training = started(tmp_path, f'optimizer={optimizer},target_modules=["query"]', batches=1).training
        training.run(lambda training: None)
        adaptation = training.adaptation
        for name, parameter in adaptation.model.named_parameters():
            state = adaptation.optimizer.state[parameter]
            if name.endswith("query.weight"):
                assert state["exp_avg"].numel() < parameter.numel()
            elif ".layer." in name and parameter.dim() == 2 and others is None:
                assert not any(isinstance(value, torch.Tensor) for value in state.values())
            else:
                assert state["exp_avg"].shape == parameter.shape, name


class TestMemory:
    def measured(self, settings, tmp_path):
        training = started(tmp_path, settings).training
        training.run(lambda training: None)
        return training.sizes.optimizer_bytes

    @pytest.mark.parametrize("settings", [*SETTINGS, *OTHERS])
    def test_a_dry_run_tells_what_is_measured_and_that_is_less_than_adamws(self, settings, tmp_path):
        run = started(tmp_path, settings)
        (note,) = run.method.notes(run.before, TrainSpec(batches=9), 100)
        found, whole = self.measured(settings, tmp_path), self.measured("", tmp_path)
        assert note == f"the optimizer keeps {found:,} bytes, AdamW would keep {whole:,}"
        assert found < whole

    @pytest.mark.parametrize(
        ("settings", "bytes_of_a_layer"),
        [  # width 16, feed-forward 32: in each of two layers four of 16 x 16, one of 32 x 16 and one of 16 x 32
            ("optimizer=galore,rank=3", 4 * 3 * (4 * (2 * 16 + 16) + 2 * (2 * 32 + 16))),
            ("optimizer=frugal,density=0.25", 4 * 4 * (8 * 16 + 8) + 4 * (8 * 32 + 8) + 8 * (8 * 16 + 8)),
            ("optimizer=dct_adamw,rank=3", 3 * (4 * (8 * 16 + 8) + 2 * (8 * 32 + 8))),
        ],
    )
    def test_bytes_by_hand(self, settings, bytes_of_a_layer, tmp_path):
        before = started(tmp_path, settings).before
        linear = {f"{name}.weight" for name in before.layers}
        others = sum(8 * p.numel() + 4 for name, p in before.module.named_parameters() if name not in linear)
        transform = 4 * 16 * 16 if "dct" in settings else 0
        assert self.measured(settings, tmp_path) == 2 * bytes_of_a_layer + others + transform

    def test_a_record_has_it(self, tmp_path):
        store = RecordStore(tmp_path)
        store.make_ready()
        records = [run_one(spec_of(Subject(name, tmp_path)), store) for name in ("head", "full[optimizer=galore]")]
        head = records[0].parameters.head
        assert records[0].optimizer_bytes == 8 * head + 4 * 4  # moments of all numbers, counts of four tensors
        assert records[1].optimizer_bytes == self.measured("optimizer=galore", tmp_path)


class TestNames:
    def test_adamw_has_the_parameters_that_it_always_had(self):
        full = registry.make_method("full", {}).model_dump(mode="json")
        assert full == {"learning_rate": 5e-5, "weight_decay": 0.0}

    @pytest.mark.parametrize("label", ["full[optimizer=galore]", "full[optimizer=frugal,density=0.5]"])
    def test_a_label_has_what_was_given_and_a_spec_has_everything(self, label):
        parameters = method_of(label).model_dump(mode="json")
        assert registry.label_of("full", parameters) == label
        assert registry.make_method("full", parameters) == method_of(label)
        assert parameters["interval"] == 500

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("full[rank=4]", "rank = 4 is no setting of optimizer = adamw, but of galore and dct_adamw"),
            ("full[optimizer=frugal,scale=2.0]", "scale = 2.0 is no setting of optimizer = frugal, but of galore"),
            ("full[optimizer=galore,kappa=0.5]", "kappa = 0.5 is no setting of optimizer = galore, but of frugal"),
            ("full[optimizer=adam]", "it should be 'adamw', 'galore', 'frugal' or 'dct_adamw'"),
            ("full[optimizer=galore,rank=99]", "rank = 99 is above the smaller side of layer"),
            (
                "full[optimizer=frugal,density=1.5]",
                "full.density = 1.5 is not allowed: it should be less than or equal",
            ),
            ('full[optimizer=galore,target_modules=["quer"]]', "Did you mean 'query'?"),
            ("lora[optimizer=galore]", "Methods with 'optimizer': full."),
            ("head[rank_min=4]", "Methods with 'rank_min': gora"),
        ],
    )
    def test_bad_settings_are_one_line(self, method, message, tmp_path, capsys):
        assert_refused(method, message, tmp_path, capsys, "--batches", "4")

    def test_layers_that_are_no_matrices(self):
        kernels = Backbone(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Linear(2, 2)), head=("1",), layers=("0",))
        method = method_of("full[optimizer=galore]")
        assert "no linear layer" in method.unsupported(kernels)
        mixed = Backbone(Network(), head=("head",), layers=("convolution", "linear", "transposed"))
        assert method.unsupported(mixed) is None
        with pytest.raises(ValueError, match="'convolution' is no linear layer"):
            method_of('full[optimizer=galore,target_modules=["convolution"]]').unsupported(mixed)
