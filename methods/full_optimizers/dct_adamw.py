"""DCT-AdamW (Modoranu et al., 2025, arXiv 2505.17967): Adam on columns of the gradient's cosine transform."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from methods.full_optimizers.matrix_adamw import MatrixAdamW, State, adam, tall

MOMENTS = ("exp_avg", "exp_avg_sq")


class DctAdamW(MatrixAdamW):
    """Q is the cosine transform of the smaller side, one for all weights that share it. Of S = G Q (G turned so that it
    is tall) the `rank` columns of the largest norm are chosen every `interval` updates. With Q_r for these columns of
    Q, W moves against Adam(G Q_r) Q_r^T. The moments of columns that stay go with them, and new ones begin with 0.

    selection: "l1", the sum of absolute values, or "l2", which keeps the most of |G|^2.
    error_feedback: G - G Q_r Q_r^T is added to the next gradient.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        *,
        rank: int,
        interval: int,
        selection: Literal["l1", "l2"],
        error_feedback: bool,
    ) -> None:
        super().__init__(groups, learning_rate, interval)
        self.rank, self.norm, self.error_feedback = rank, int(selection[1:]), error_feedback

    def direction(self, group: dict[str, Any], state: State, gradient: Tensor) -> Tensor:
        """See `MatrixAdamW.direction`."""
        turned = tall(gradient)
        if "error" in state:
            turned = turned + state["error"]
        transform = self._transform(turned)
        if self.is_due(state):
            self._choose(state, (turned @ transform).norm(p=self.norm, dim=0))
        basis = transform.index_select(1, state["columns"])
        low = turned @ basis
        if self.error_feedback:
            state["error"] = (turned - low @ basis.T).contiguous()
        return tall(adam(group, state, low) @ basis.T, like=gradient)

    def _choose(self, state: State, norms: Tensor) -> None:
        """Take the columns of the largest norms, and the moments of those that were taken before."""
        chosen = norms.topk(self.rank).indices.sort().values
        for name in MOMENTS if "columns" in state else ():
            state[name] = carried(state[name], state["columns"], chosen)
        state["columns"] = chosen

    def _transform(self, matrix: Tensor) -> Tensor:
        key = (matrix.shape[1], matrix.dtype, matrix.device)
        if key not in self.shared:
            self.shared[key] = cosine_transform(matrix.shape[1]).to(matrix.device, matrix.dtype)
        return self.shared[key]


def cosine_transform(size: int) -> Tensor:
    """Q_ij = sqrt(2 / size) c_i cos(pi i (2 j + 1) / (2 size)) with c_0 = sqrt(1 / 2) and else 1: orthogonal, (size,
    size), in float64. x Q is the transform of type III of a row x, x Q^T that of type II."""
    places = torch.arange(size, dtype=torch.float64)
    found = math.sqrt(2 / size) * torch.cos(math.pi * places[:, None] * (2 * places + 1) / (2 * size))
    found[0] *= math.sqrt(0.5)
    return found


def carried(moment: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """A moment of the columns `before`, (rows, rank), as one of the columns `now`: those of both are copied, the others
    are 0. Both in rising order.

    It is the rotation moment Q_before^T Q_now, whose entries are 0 and 1 since Q is orthogonal.
    """
    places = torch.searchsorted(before, now).clamp_(max=len(before) - 1)
    return torch.where(before[places] == now, moment[:, places], 0.0).contiguous()
