"""FRUGAL (Zmushko et al., 2024, arXiv 2411.07837): AdamW in a subspace, signSGD in the rest."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from methods.full_optimizers.matrix_adamw import MatrixAdamW, State, adam, leading_directions, tall


class Frugal(MatrixAdamW):
    """A part of a gradient goes through Adam, the rest R moves its weights by kappa sign(R). Every `interval` updates
    another part is chosen, with new moments and a new count for their bias.

    subspace: "columns", round(density inputs) of them at random, or "svd", the gradient's round(density smaller side)
    leading directions on its smaller side. Weights of a group without "moments" have no such part.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        *,
        density: float,
        interval: int,
        kappa: float,
        subspace: Literal["columns", "svd"],
    ) -> None:
        super().__init__(groups, learning_rate, interval)
        self.density, self.kappa, self.subspace = density, kappa, subspace

    def direction(self, group: dict[str, Any], state: State, gradient: Tensor) -> Tensor:
        """See `MatrixAdamW.direction`."""
        if not group["moments"] or self.density == 0:
            return self.kappa * gradient.sign()
        if self.subspace == "svd":
            return self._in_directions(group, state, gradient)
        return self._in_columns(group, state, gradient)

    def _in_columns(self, group: dict[str, Any], state: State, gradient: Tensor) -> Tensor:
        inputs = gradient.shape[1]
        if self.is_due(state):
            drawn = torch.randperm(inputs, generator=self.rng)[: round(self.density * inputs)]
            state.clear()
            state.update(step=0, columns=drawn.sort().values.to(gradient.device))
        found = self.kappa * gradient.sign()
        found[:, state["columns"]] = adam(group, state, gradient.index_select(1, state["columns"]))
        return found

    def _in_directions(self, group: dict[str, Any], state: State, gradient: Tensor) -> Tensor:
        turned = tall(gradient)
        if self.is_due(state):
            state.clear()
            state.update(step=0, basis=leading_directions(turned, round(self.density * turned.shape[1])))
        basis = state["basis"]
        low = turned @ basis
        found = adam(group, state, low) @ basis.T
        if basis.shape[0] > basis.shape[1]:  # else the rest is rounding, of which the sign would be a whole step
            found += self.kappa * (turned - low @ basis.T).sign()
        return tall(found, like=gradient)
