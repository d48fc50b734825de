"""The hypergradient through one unrolled step of a lower level, by finite differences (DARTS, Liu et al., ICLR 2019).

The lower level's weights w descend f2(w, a) on its own rows; the upper level's variables a descend f1 on others. With
w' = w - size d_w f2(w, a), the gradient of f1(w', a) in a is

    d_a f1(w', a) - size d_a d_w f2 . v        v = d_w f1(w', a)

and the product with the second derivative is a central difference of d_a f2 along v:

    (d_a f2(w' + e v, a) - d_a f2(w' - e v, a)) / 2 e        e = RADIUS / |v|

This is Betty's `darts` (Choe et al., ICLR 2023), which AutoLoRA's code calls: it takes the difference around w', the
weights after the step, and its size is 1 whatever the learning rate is. DARTS takes it around w.

What differs from Betty's: the weights are put back bit for bit, where it leaves them at w' - e v unless the whole step
is rolled back; both ends of the difference see the same random numbers, since what two dropout masks make would be
divided by 2 e; and where v is 0 there is no difference, instead of a division by 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.errors import InputError
from harness.method import Indices, Step

if TYPE_CHECKING:
    from torch import Tensor

RADIUS = 0.01  # how far the weights move for the difference, as one vector; DARTS' and Betty's


def batches_a_step(size: float) -> int:
    """Batches that one hypergradient takes of the budget."""
    return 3 if size else 1


def unrolled_gradient(
    step: Step, upper: Indices, lower: Indices, weights: Sequence[Tensor], variables: Sequence[Tensor], size: float
) -> tuple[Tensor, list[Tensor]]:
    """(f1, its gradient in each of the variables), with the weights where the lower level's step has brought them.

    upper, lower: the batches of f1 and of f2. size: of the unrolled step, at least 0; with 0 it is the plain gradient
    of f1, and f2 is not asked for. Uses `batches_a_step` of the budget, 1 where v is 0. Gradients that are there are
    dropped, and none are left.
    """
    import torch

    from methods.shared.optimizer_state import gradient_of

    def clear() -> None:
        for tensor in (*weights, *variables):
            tensor.grad = None

    clear()
    loss = step.backward(upper)
    found = [gradient_of(variable) for variable in variables]
    v = [gradient_of(weight) for weight in weights]
    clear()
    norm = torch.stack([torch.linalg.vector_norm(own, dtype=torch.float64) for own in v]).norm()
    if size == 0 or norm == 0:
        return loss, found
    distance = float(RADIUS / norm)
    before = [weight.detach().clone() for weight in weights]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, own, along in zip(weights, before, v, strict=True):
                weight.copy_(own + sign * distance * along)
        if sign == 1:
            step.backward(lower)
        else:  # with the random numbers of that one
            step.loss(lower).backward()
        ends.append([gradient_of(variable) for variable in variables])
        clear()
    with torch.no_grad():
        for weight, own in zip(weights, before, strict=True):
            weight.copy_(own)
        factor = size / (2 * distance)
        return loss, [own - factor * (plus - minus) for own, plus, minus in zip(found, *ends, strict=True)]


def check_halves(rows: int, held_out: float) -> None:
    """Raises InputError where one of the two levels has a single row, or none."""
    upper = min(max(1, round(held_out * rows)), rows - 1)
    if min(upper, rows - upper) < 2:
        raise InputError(
            f"held_out = {held_out:g} of {rows} training rows leaves {rows - upper} and {upper}: each level needs at "
            "least 2",
            "held_out",
        )
