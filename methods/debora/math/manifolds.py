"""The sets that a factor U of shape (n, r) may be confined to, in pure functions.

euclidean: every matrix. oblique: columns of norm 1. stiefel: orthonormal columns, so r <= n. The last two are embedded
in the matrices with the inner product <X, Y> = tr(X^T Y). Deleting columns keeps both.

Every function takes any leading dimensions, (..., n, r), and treats each matrix alone; r may be 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Manifold = Literal["euclidean", "oblique", "stiefel"]


def project(manifold: Manifold, matrix: Tensor) -> Tensor:
    """The nearest point of the manifold in the Frobenius norm.

    oblique: columns divided by their norms; none of them may be 0. stiefel: the polar factor W Z^T of the singular
    value decomposition W S Z^T; the rank must be r. ValueError for a Stiefel matrix with more columns than rows.
    """
    if manifold == "oblique":
        return matrix / matrix.norm(dim=-2, keepdim=True)
    if manifold == "stiefel":
        _check_tall(matrix)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return left @ right
    return matrix


def project_tangent(manifold: Manifold, point: Tensor, vector: Tensor) -> Tensor:
    """The nearest vector of the tangent space at `point`, of the shape of `vector`: of a gradient, the Riemannian one.

    oblique: u_i^T x_i = 0 in every column. stiefel: X - U sym(U^T X) (Edelman, Arias and Smith, 1998), so that
    U^T X is skew. On both, the diagonal of U^T X is 0: the projection has no radial part.
    """
    if manifold == "oblique":
        return vector - point * (point * vector).sum(-2, keepdim=True)
    if manifold == "stiefel":
        product = point.mT @ vector
        return vector - point @ ((product + product.mT) / 2)
    return vector


def retract(manifold: Manifold, point: Tensor, tangent: Tensor) -> Tensor:
    """The point of the manifold that the step `tangent` from `point` leads to, to first order.

    oblique: point + tangent with its columns normalised. stiefel: the Q of its QR decomposition, with the signs for
    which R has a positive diagonal, so that a step of 0 stays at the point.
    """
    moved = point + tangent
    if manifold == "oblique":
        return moved / moved.norm(dim=-2, keepdim=True)
    if manifold == "stiefel":
        _check_tall(moved)
        Q, R = torch.linalg.qr(moved)
        return Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)[..., None, :]
    return moved


def distance_to(manifold: Manifold, point: Tensor) -> Tensor:
    """How far a matrix is from meeting its constraint, (...): the largest entry of |norm^2 - 1| or |U^T U - I|."""
    if point.shape[-1] == 0 or manifold == "euclidean":
        return point.new_zeros(point.shape[:-2])
    if manifold == "oblique":
        return (point.square().sum(-2) - 1).abs().amax(-1)
    identity = torch.eye(point.shape[-1], dtype=point.dtype, device=point.device)
    return (point.mT @ point - identity).abs().amax((-2, -1))


def _check_tall(matrix: Tensor) -> None:
    n, r = matrix.shape[-2:]
    if r > n:
        raise ValueError(f"{r} columns of length {n} cannot be orthonormal: a Stiefel factor has at most {n}")
