"""What the hooks of an `Adaptation` see of the training loop: the data, and one update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Stream = Literal["all", "lower", "upper"]
Indices = tuple[int, ...]  # one batch: positions in the training split


class TrainData(Protocol):
    """The training split as a method sees it."""

    size: int

    def draw(self, stream: Stream) -> Indices:
        """The next batch of a stream. "all": the training split in this seed's order; "lower" and "upper": two random
        parts of it without a common row, of the sizes that `Method.upper_share` says. Every draw is counted and is part
        of a checkpoint."""


class Step(Protocol):
    """One update of the training loop, as the hooks of an `Adaptation` see it."""

    index: int  # updates made before this one
    budget: int  # batches that the whole run may put through forward and backward
    used: int  # batches used so far, those of this step included

    @property
    def rng(self) -> torch.Generator:
        """For a method's own random choices, on the CPU. It is seeded anew for every update, from the run's seed and
        the update's index: a resumed run draws the same, and what is drawn moves neither dropout nor the data's order.
        """

    def backward(self, batch: Indices) -> Tensor:
        """Forward and backward of one batch, adding to the gradients (autocast and accumulation included). Within
        torch.no_grad it is a forward alone, which counts the same.

        Returns the detached mean loss (a scalar tensor). Uses one batch of the budget; raises RuntimeError when none is
        left, so look at `used` first."""

    def loss(self, batch: Indices) -> Tensor:
        """Forward of one batch: its mean loss, a scalar tensor, with a graph except under torch.no_grad.

        The random numbers (dropout, noise) are those of the last `backward`, so that losses at two points can be
        compared; call it after one. Nothing is kept of it, so it is for derivatives that `backward` does not give and
        for trial points. Uses one batch of the budget, with or without derivatives; RuntimeError as in `backward`."""

    def spend(self, batches: int) -> None:
        """Count passes that a method makes through a graph of `loss` (products with second derivatives) as batches of
        the budget. Raises RuntimeError where fewer are left."""

    def restart_schedule(self) -> None:
        """Begin the learning-rate schedule anew over what is left of the budget (for two-phase methods)."""

    def restart_warmup(self, batches: int) -> None:
        """Warm the learning rate up again from 0 over the next `batches` of the budget, while its decay goes on (after
        a merge, as in ReLoRA, Lialin et al., 2023, arXiv 2307.05695): the schedule's factor is multiplied by the share
        of `batches` used since. A later call replaces this one; `restart_schedule` ends it. Raises ValueError for less
        than one batch."""

    def resized(self) -> None:
        """Say that `adapter_parameters` or `ranks` changed where no parameter of the optimizer shows it: by a mask, or
        by parameters that are frozen and stay in effect. Sizes of what the optimizer trains need no word."""
