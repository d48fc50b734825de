"""GaLore (Zhao et al., 2024, arXiv 2403.03507): Adam on a projection of the gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from methods.full_optimizers.matrix_adamw import MatrixAdamW, State, adam, leading_directions, tall


class GaLore(MatrixAdamW):
    """P holds the `rank` leading singular vectors of the gradient G, on its smaller side, every `interval` updates. A
    tall W moves against scale Adam(G P) P^T, a wide one against scale P Adam(P^T G) (the paper's Algorithm 2).

    The moments stay when P changes, as in the paper and its code, although their coordinates are then others.
    """

    def __init__(
        self, groups: list[dict[str, Any]], learning_rate: float, *, rank: int, interval: int, scale: float
    ) -> None:
        super().__init__(groups, learning_rate, interval)
        self.rank, self.scale = rank, scale

    def direction(self, group: dict[str, Any], state: State, gradient: Tensor) -> Tensor:
        """See `MatrixAdamW.direction`."""
        turned = tall(gradient)
        if self.is_due(state):
            state["basis"] = leading_directions(turned, self.rank)
        low = adam(group, state, turned @ state["basis"])
        return tall(low @ state["basis"].T * self.scale, like=gradient)
