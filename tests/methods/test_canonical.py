"""Updates in a basis of their own: the same function, the decomposition it should be, gradients and moments with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.errors import Diverged
from methods.debora.math.manifolds import distance_to
from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.convolution import DeboraConv2d
from methods.debora.tuner.layer import DeboraLayer, DeboraLinear
from methods.shared.canonical import Basis, normalised, rotate_lora, singular_basis
from methods.shared.optimizer_state import change_basis

ADAPTER = "default"
SHAPES = {"tall": (12, 9, 4), "square": (4, 4, 4), "wide": (3, 4, 5), "vector": (5, 6, 1), "none": (5, 6, 0)}
KINDS = ("any", "zero", "rank 1", "deficient", "both deficient", "without V")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def pair(shape: str, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """U, V and s."""
    m, n, r = SHAPES[shape]
    U, V, s = random(m, r), random(n, r, seed=1), random(r, seed=2).abs() + 0.1
    if kind == "zero":
        U.zero_()
    if kind == "rank 1":
        U = U[:, :1] * random(r, seed=3)
    if kind in ("deficient", "both deficient") and r > 1:
        U[:, 1] = U[:, 0] - U[:, -1]
    if kind == "both deficient" and r > 1:
        V[:, 0] = 2 * V[:, -1]
    if kind == "without V":
        V.zero_()
    return U.to(dtype), V.to(dtype), s.to(dtype)


def update(factors: Any, s: Tensor) -> Tensor:
    """sum_i s_i u_i^(1) (x) ... (x) u_i^(d), component by component, in float64."""
    letters = "abcd"[: len(factors)]
    total = torch.zeros([len(factor) for factor in factors], dtype=torch.float64)
    for i in range(len(s)):
        total += s[i].double() * torch.einsum(",".join(letters) + "->" + letters, *(f[:, i].double() for f in factors))
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
class TestSingularBasis:
    def test_it_is_the_decomposition_of_the_same_matrix(self, shape: str, kind: str, dtype: torch.dtype) -> None:
        U, V, s = pair(shape, kind, dtype)
        before, found = update((U, V), s), singular_basis(U, V, s)
        scale = float(before.abs().max()) if before.numel() else 0.0
        close = {"rtol": 0, "atol": (1e-12 if dtype == torch.float64 else 1e-6) * max(1.0, scale)}
        torch.testing.assert_close(update(found.factors, found.s), before, **close)
        assert [(factor.shape, factor.dtype) for factor in found.factors] == [(U.shape, dtype), (V.shape, dtype)]
        assert torch.equal(found.s, s.sort(descending=True).values)
        expected = torch.zeros(len(s), dtype=torch.float64)
        values = torch.linalg.svdvals(before)[: len(s)]
        expected[: len(values)] = values
        torch.testing.assert_close(found.sizes, expected, **close)
        for factor in found.factors:
            gram = factor.double().T @ factor.double()
            torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=close["atol"] * 10)

    def test_columns_are_balanced_and_none_is_dead(self, shape: str, kind: str, dtype: torch.dtype) -> None:
        U, V, s = pair(shape, kind, dtype)
        found = singular_basis(U, V, s)
        left, right = (factor.double().norm(dim=0) for factor in found.factors)
        live = found.sizes > 1e-6 * found.sizes[:1]
        balanced = (found.sizes[live] / found.s[live]).sqrt()
        torch.testing.assert_close(left[live], balanced, rtol=1e-5, atol=0)
        torch.testing.assert_close(right[live], balanced, rtol=1e-5, atol=0)
        assert not left[~live].any()
        dimension = min(len(s), len(V))  # so many columns can be orthogonal
        longer = max(float(U.norm()), float(V.norm())) / max(1, len(s)) ** 0.5
        if shape != "wide":
            assert right[~live].tolist() == pytest.approx([longer] * int((~live).sum()))
        assert int((right > 0).sum()) == dimension

    def test_gradients_are_mapped(self, shape: str, kind: str, dtype: torch.dtype) -> None:
        """Of f = <G, W> they are G V diag(s) and G^T U diag(s)."""
        U, V, s = pair(shape, kind, dtype)
        found, G = singular_basis(U, V, s), random(len(U), len(V), seed=4)
        rows = (G @ V.double() * s) @ found.maps[0].T, (G.T @ U.double() * s) @ found.maps[1].T
        new = [factor.double() for factor in found.factors]
        close = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 1e-4}
        torch.testing.assert_close(rows[1], G.T @ new[0] * found.s, **close)
        if torch.linalg.matrix_rank(V) == len(s):  # else V has directions that nothing is known of
            torch.testing.assert_close(rows[0], G @ new[1] * found.s, **close)


def test_unit_columns_take_s_for_the_singular_values():
    U, V = (nn.functional.normalize(random(size, 3, seed=size), dim=0) for size in (8, 7))
    s = torch.tensor([0.3, 1.2, 0.7], dtype=torch.float64)
    before, found = update((U, V), s), singular_basis(U, V, s, unit_columns=True)
    torch.testing.assert_close(update(found.factors, found.s), before)
    torch.testing.assert_close(found.s, torch.linalg.svdvals(before)[:3])
    assert found.s.sum() < s.sum()
    assert max(float(distance_to("stiefel", factor)) for factor in found.factors) < 1e-12


@pytest.mark.parametrize("kind", ["any", "zero", "rank 1", "deficient"])
def test_the_first_moment_is_that_of_a_life_in_the_new_basis(kind):
    """Of a recorded history of gradients of W; likewise the second, where the change is a permutation with signs."""
    U, V, s = pair("tall", kind)
    history = [random(12, 9, seed=10 + t) for t in range(6)]

    def first_moments(factors: Any, s: Tensor) -> list[Tensor]:
        parameters = [nn.Parameter(factor.clone()) for factor in factors]
        optimizer = torch.optim.AdamW(parameters, lr=0.0)
        for G in history:
            parameters[0].grad, parameters[1].grad = G @ factors[1] * s, G.T @ factors[0] * s
            optimizer.step()
        basis = singular_basis(*factors, s) if factors[0] is U else Basis(tuple(factors), s, s, (torch.eye(4),) * 2)
        for parameter, values, P in zip(parameters, basis.factors, basis.maps, strict=True):
            change_basis(parameter, values, P, 1, optimizer)
        return [optimizer.state[parameter]["exp_avg"] for parameter in parameters]

    found = singular_basis(U, V, s)
    for moment, expected in zip(first_moments((U, V), s), first_moments(found.factors, found.s), strict=True):
        torch.testing.assert_close(moment, expected)


@pytest.mark.parametrize("kind", ["zero", "rank 1", "deficient", "without V"])
def test_training_goes_on_from_any_pair(kind):
    """To a target of full rank, by plain gradient descent, also in the directions that had nothing."""
    U, V, s = pair("tall", kind)
    target = torch.linalg.qr(random(12, 4, seed=5)).Q @ torch.linalg.qr(random(9, 4, seed=6)).Q.T
    found = singular_basis(U, V, s)
    factors = [nn.Parameter(factor) for factor in found.factors]
    optimizer = torch.optim.SGD(factors, lr=0.03, momentum=0.9)
    for _ in range(800):
        optimizer.zero_grad()
        loss = ((factors[0] * found.s) @ factors[1].T - target).square().sum() / 2
        loss.backward()
        optimizer.step()
    assert loss < 1e-4 * target.square().sum()


def test_one_gradient_step_is_the_same_in_either_basis():
    """To first order in the step, where the pair is the balanced one turned by a rotation and s is constant."""
    U, V, s = pair("tall", "any")
    found, R = singular_basis(U, V, torch.full_like(s, 0.5)), torch.linalg.qr(random(4, 4, seed=7)).Q
    turned, G, changes = [factor @ R for factor in found.factors], random(12, 9, seed=8), []
    again = singular_basis(*turned, found.s)
    for left, right in (turned, again.factors):
        step = [left - 1e-7 * G @ right * 0.5, right - 1e-7 * G.T @ left * 0.5]
        changes.append((step[0] @ step[1].T - left @ right.T) / 1e-7)
    torch.testing.assert_close(changes[0], changes[1], rtol=0, atol=1e-5)
    assert changes[0].norm() > 1


@pytest.mark.parametrize("shapes", [((7, 4), (4, 6)), ((7, 4, 1, 1), (4, 3, 3, 2))])
def test_a_lora_pair(shapes):
    B, A = (nn.Parameter(random(*shape)) for shape in shapes)
    before = B.detach().flatten(1) @ A.detach().flatten(1)
    optimizer = torch.optim.AdamW([B, A], lr=0.0)
    G = random(*before.shape, seed=9)
    B.grad, A.grad = (G @ A.detach().flatten(1).T).view_as(B), (B.detach().flatten(1).T @ G).view_as(A)
    optimizer.step()
    basis = rotate_lora(B, A, optimizer)
    assert (B.shape, A.shape) == shapes
    torch.testing.assert_close(B.detach().flatten(1) @ A.detach().flatten(1), before)
    torch.testing.assert_close(basis.sizes, torch.linalg.svdvals(before)[:4])
    torch.testing.assert_close(B.grad.flatten(1), G @ A.detach().flatten(1).T)
    torch.testing.assert_close(optimizer.state[A]["exp_avg"].flatten(1), 0.1 * B.detach().flatten(1).T @ G)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_a_divergence(value):
    """LAPACK's own error would be a failed run, which is made again."""
    B, A = nn.Parameter(random(5, 2)), nn.Parameter(random(2, 6))
    with torch.no_grad():
        B[3, 1] = value
    with pytest.raises(Diverged, match="not finite"):
        rotate_lora(B, A, None)


class TestNormalised:
    sizes = (5, 4, 3, 2)

    def form(self, number: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
        factors = [random(size, 5, seed=size).to(dtype) for size in self.sizes[:number]]
        return factors, (random(5, seed=30).abs() + 0.1).to(dtype)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("number", [2, 3, 4])
    def test_it_is_the_same_sum_with_definite_lengths(self, number: int, dtype: torch.dtype) -> None:
        factors, s = self.form(number, dtype)
        found = normalised(factors, s)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(update(found.factors, found.s), update(factors, s), rtol=0, atol=tolerance)
        sizes = [float(update([f[:, i : i + 1] for f in factors], s[i : i + 1]).norm()) for i in range(5)]
        assert found.sizes.tolist() == pytest.approx(sorted(sizes, reverse=True))
        assert torch.equal(found.s, s.sort(descending=True).values)
        for factor in found.factors:
            expected = (found.sizes / found.s) ** (1 / number)
            torch.testing.assert_close(factor.double().norm(dim=0), expected.double(), rtol=1e-5, atol=0)

    def test_lengths_are_in_the_units_given(self) -> None:
        (factors, s), units = self.form(3), (1.0, 2.0, 0.5)
        plain, found = normalised(factors, s), normalised(factors, s, units)
        torch.testing.assert_close(update(found.factors, found.s), update(factors, s))
        lengths = torch.stack([factor.norm(dim=0) / unit for factor, unit in zip(found.factors, units, strict=True)])
        torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))
        torch.testing.assert_close(found.sizes, plain.sizes)

    @pytest.mark.parametrize("zeros", [False, True])
    @pytest.mark.parametrize("number", [2, 3, 4])
    def test_gradients_are_mapped(self, number: int, zeros: bool) -> None:
        """Also of a component whose first column is 0: it stays as it is and takes its place at the end."""
        factors, s = self.form(number)
        if zeros:
            factors[0][:, [0, 3]] = 0
        found, G = normalised(factors, s), random(*self.sizes[:number], seed=40)

        def gradients(factors: Any, s: Tensor) -> Any:
            leaves = [factor.clone().requires_grad_() for factor in factors]
            letters = "abcd"[:number]
            terms = ",".join(f"{letter}r" for letter in letters)
            return torch.autograd.grad(torch.einsum(f"{terms},r,{letters}->", *leaves, s, G), leaves)

        for old, new, P in zip(gradients(factors, s), gradients(found.factors, found.s), found.maps, strict=True):
            torch.testing.assert_close(old @ P.T, new)
        if zeros:
            assert torch.equal(found.factors[1][:, 3:], factors[1][:, [0, 3]])
            assert not found.factors[0][:, 3:].any()
            assert all(factor.isfinite().all() for factor in (*found.factors, *found.maps))

    def test_of_columns_of_length_1_it_is_a_permutation(self) -> None:
        factors, s = self.form(3)
        factors = [nn.functional.normalize(factor, dim=0) for factor in factors]
        found, order = normalised(factors, s), s.argsort(descending=True)
        for old, new, P in zip(factors, found.factors, found.maps, strict=True):
            torch.testing.assert_close(new, old[:, order])
            torch.testing.assert_close(P, torch.eye(5, dtype=P.dtype)[order])


BASES = {
    "linear": lambda: nn.Linear(7, 6),
    "transposed": lambda: Conv1D(6, 7),
    "kernel": lambda: nn.Conv2d(6, 7, 3, padding=1),
    "1 x 1 kernel": lambda: nn.Conv2d(6, 7, 1),
}


def adapted(kind: str, geometry: str) -> DeboraLayer:
    torch.manual_seed(0)
    base, config = BASES[kind](), DeboraConfig(r=4, tau=8.0, eps=1e-3, geometry=geometry, start="vertex")
    layer = (DeboraConv2d if isinstance(base, nn.Conv2d) else DeboraLinear)(base, ADAPTER, 4, config)
    with torch.no_grad():
        for factor, manifold in zip(layer.factors(ADAPTER), layer.manifolds(ADAPTER), strict=True):
            factor.copy_(torch.randn_like(factor))
            if manifold == "oblique":
                factor.copy_(nn.functional.normalize(factor, dim=0))
            if manifold == "stiefel":
                factor.copy_(torch.linalg.qr(factor).Q)
    layer.debora_s[ADAPTER].copy_(torch.tensor([0.5, 2.0, 1e-3, 1.5]))
    return layer


def input_of(kind: str) -> Tensor:
    return random(2, 6, 5, 5, dtype=torch.float32) if "kernel" in kind else random(3, 7, dtype=torch.float32)


@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
@pytest.mark.parametrize("kind", BASES)
class TestLayer:
    def test_the_function_and_the_constraints_stay(self, kind: str, geometry: str) -> None:
        layer, x = adapted(kind, geometry), input_of(kind)
        before, psi, total = layer(x).detach(), layer.get_delta_weight(ADAPTER).detach(), layer.debora_s[ADAPTER].sum()
        found = layer.to_canonical_basis(ADAPTER, eps=1e-3)
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER), psi, rtol=0, atol=5e-6)
        torch.testing.assert_close(layer(x), before, rtol=0, atol=5e-5)
        assert torch.equal(found, layer.debora_s[ADAPTER])
        assert found.tolist() == sorted(found.tolist(), reverse=True)
        assert found.sum() <= total + 1e-6
        assert (found >= 1e-3).all()
        for factor, manifold in zip(layer.factors(ADAPTER), layer.manifolds(ADAPTER), strict=True):
            assert distance_to(manifold, factor.detach()) < 1e-5
        if geometry != "oblique":
            assert found.tolist() == pytest.approx([2.0, 1.5, 0.5, 1e-3])

    def test_the_optimizer_goes_with_it(self, kind: str, geometry: str) -> None:
        """First moments are those of the gradient that the new factors have."""
        layer, x = adapted(kind, geometry), input_of(kind)
        factors = layer.factors(ADAPTER)
        optimizer = torch.optim.AdamW(factors, lr=0.0)
        layer(x).square().sum().backward()
        optimizer.step()
        layer.to_canonical_basis(ADAPTER, optimizer, eps=1e-3)
        moments = [optimizer.state[factor]["exp_avg"].clone() for factor in factors]
        gradients = [factor.grad.clone() for factor in factors]
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        for factor, moment, gradient in zip(factors, moments, gradients, strict=True):
            scale = float(factor.grad.abs().max())
            torch.testing.assert_close(gradient, factor.grad, rtol=0, atol=1e-4 * scale)
            torch.testing.assert_close(moment, 0.1 * factor.grad, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["linear", "1 x 1 kernel"])
def test_oblique_columns_are_rotated_where_s_may_be_the_singular_values(kind):
    layer = adapted(kind, "oblique")
    layer.debora_s[ADAPTER].copy_(torch.tensor([1.4, 1.2, 1.1, 1.0]))
    values = torch.linalg.svdvals(layer.get_delta_weight(ADAPTER).detach().flatten(1))[:4]
    least = float(values[-1])
    before = [factor.detach().clone() for factor in layer.factors(ADAPTER)]
    layer.to_canonical_basis(ADAPTER, eps=1.01 * least)
    for factor, old in zip(layer.factors(ADAPTER), before, strict=True):
        torch.testing.assert_close(factor.detach(), old)
    found = layer.to_canonical_basis(ADAPTER, eps=0.99 * least)
    torch.testing.assert_close(found, values)
    assert max(float(distance_to("stiefel", factor.detach())) for factor in layer.factors(ADAPTER)) < 1e-5


@pytest.mark.parametrize("geometry", ["matrix", "oblique"])
def test_a_new_layer_stays_what_it_is_and_learns(geometry):
    """Whose update is 0: U is 0, or unit columns cancel."""
    torch.manual_seed(0)
    layer = DeboraLinear(nn.Linear(7, 6), ADAPTER, 4, DeboraConfig(r=4, tau=8.0, eps=1e-3, geometry=geometry))
    layer.to_canonical_basis(ADAPTER, eps=1e-3)
    x = input_of("linear")
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    (layer(x) - 1).square().sum().backward()
    assert all((factor.grad.norm(dim=0) > 0).all() for factor in layer.factors(ADAPTER)[:1])


def test_a_layer_of_rank_0():
    layer = DeboraLinear(nn.Linear(7, 6), ADAPTER, 0, DeboraConfig())
    assert layer.to_canonical_basis(ADAPTER).shape == (0,)
