"""A LoRA in two levels: the factors descend the loss on a part of the rows, weights of the components on the others.

What such methods share: the weights, when the upper level moves, what that takes of the budget, and Adam for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.errors import InputError
from harness.method import Backbone, PeftForm, Step, Trace, TrainData
from harness.parameters import Range, SearchSpace
from methods.shared.cut_lora import CutLoraAdaptation, along, weighted
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, shared_parameters, unfit_at_rank
from methods.shared.peft_names import ADAPTER
from methods.shared.shares import least_budget
from methods.shared.unrolled import batches_a_step, check_halves

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

BETAS = (0.5, 0.999)  # of the upper level's Adam: DARTS', and so AutoLoRA's
UPPER_LOSS = Trace("upper_loss", "loss of the upper level")
VALUES = "component_values"  # what a layer's weights are made of, a parameter of the layer


class BilevelLora(LoraMethod, ABC):
    """What the methods share: the update (alpha / rank) B diag(w(a)) A, a of an upper level.

    After every `upper_every` updates of the lower level the upper one makes a step of Adam, at a constant learning
    rate, with the hypergradient of `methods.shared.unrolled`: the derivative through the update just made. It takes 3
    batches, 1 with unrolled_step = 0.
    """

    group: ClassVar[str] = "ranks searched"
    data_rule: ClassVar[Literal["all", "halves"]] = "halves"
    capabilities = ("linear", "conv2d", "rank-adaptive")
    search_space: ClassVar[SearchSpace] = {
        "learning_rate": Range(1e-5, 1e-2, log=True),
        "upper_learning_rate": Range(1e-4, 1e-1, log=True),
    }

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of the lower level")
    rank: int = Field(
        8,
        ge=1,
        description="rank of every layer at the start, at most its smaller side",
        json_schema_extra={"peft": "r"},
    )
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    components: int | None = Field(None, ge=1, description="components in the end, over all layers")
    held_out: float = Field(0.3, gt=0, lt=1, description="share of the rows that is the upper level's")
    upper_learning_rate: float = Field(3e-4, ge=0, description="learning rate of the upper level, constant")
    upper_every: int = Field(1, ge=1, description="updates of the lower level before each step of the upper one")
    unrolled_step: float = Field(
        1.0, ge=0, description="size of the unrolled lower step in the hypergradient; 0: the plain gradient"
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @property
    def upper_share(self) -> float:
        """See `Method.upper_share`."""
        return self.held_out

    @abstractmethod
    def first_value(self) -> float:
        """What all entries of a start with."""

    @abstractmethod
    def component_weights(self, values: Tensor) -> Tensor:
        """w(a) of one layer, (rank,) or (1,)."""

    @property
    def batches_a_round(self) -> int:
        """Batches that a step of the upper level takes, with the updates before it."""
        return self.upper_every + batches_a_step(self.unrolled_step)

    def end_of(self, setting: str, budget: int) -> int:
        """Batches of the share of the budget that `setting` names.

        Raises InputError, with the least budget, where no round fits into it, or nothing is left after it."""
        share = getattr(self, setting)

        def fits(each: int) -> bool:
            return self.batches_a_round <= math.ceil(share * each) < each

        if not fits(budget):
            raise InputError(
                f"{setting} = {share:g} does not fit into {budget} batches, with {self.batches_a_round} before the end "
                f"of that share and 1 after it: it takes at least {least_budget(fits)}",
                setting,
            )
        return math.ceil(share * budget)

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        return unfit_at_rank(backbone, self.target_modules, self.rank, self.components)

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: the LoRA that it ends with."""
        return lora_form(ranks, self.alpha / self.rank, shared_parameters(self, self.dropout))

    def told(self, batches: int, train: TrainSpec, num_examples: int) -> str:
        """What the two levels do in the first so many batches. Raises InputError for too few rows."""
        check_halves(num_examples, self.held_out)
        steps, each = batches // self.batches_a_round, batches_a_step(self.unrolled_step)
        return (
            f"{steps} steps of the upper level, {each} batch{'es' if each > 1 else ''} each, in the first {batches} of "
            f"{train.budget(num_examples)} batches, {batches - each * steps} of which are updates"
        )


class BilevelLoraAdaptation(CutLoraAdaptation):
    """One run in two levels. The values are parameters of the layers. The optimizer, which is the lower level's, holds
    them and gets no gradient of them; `upper`, the upper level's, trains them."""

    method: BilevelLora

    def __init__(
        self,
        method: BilevelLora,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        data: TrainData,
    ) -> None:
        import torch

        self.method = method  # which `scaled_pairs` asks
        super().__init__(method, model, optimizer, backbone, targets)
        self.data = data
        self.stream = "lower"
        self.upper = torch.optim.Adam(self.values(), lr=method.upper_learning_rate, betas=BETAS)
        self.hooks = [
            layer.lora_A[ADAPTER].register_forward_hook(self._weighting(layer)) for layer in self.layers.values()
        ]

    def values(self) -> list[nn.Parameter]:
        """a of every layer of `targets`, (rank,) each, or (1,) where its components have one weight."""
        return [getattr(self.layers[name], VALUES) for name in self.targets]

    def component_weights(self) -> list[Tensor]:
        """w(a) of every layer of `targets`."""
        return [self.method.component_weights(values) for values in self.values()]

    def upper_penalty(self) -> Tensor | None:
        """What the upper level minimises beside its loss."""
        return None

    def is_due(self, step: Step, end: int) -> bool:
        """Whether a step of the upper level comes after this update, and fits into the first `end` batches."""
        fits = step.used + batches_a_step(self.method.unrolled_step) <= end
        return fits and (step.index + 1) % self.method.upper_every == 0

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`: the lower level leaves the values alone."""
        for values in self.values():
            values.grad = None

    def upper_step(self, step: Step) -> dict[str, Any]:
        """Let the upper level make its step. Returns what the history gets of it."""
        from methods.shared.unrolled import unrolled_gradient

        size, variables = self.method.unrolled_step, self.values()
        own = set(variables)
        weights = [p for group in self.optimizer.param_groups for p in group["params"] if p not in own]
        upper, lower = self.data.draw("upper"), self.data.draw("lower") if size else ()
        loss, gradients = unrolled_gradient(step, upper, lower, weights, variables, size)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        penalty = self.upper_penalty()
        if penalty is not None:
            penalty.backward()
        self.upper.step()
        self.upper.zero_grad(set_to_none=True)
        return {UPPER_LOSS.name: loss}

    def scaled_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LoraAdaptation.scaled_pairs`; the weights are in B."""
        pairs = super().scaled_pairs()
        for name, (B, A) in pairs.items():
            if (values := getattr(self.layers[name], VALUES, None)) is not None:
                pairs[name] = B * along(self.method.component_weights(values.detach()), B, 1), A
        return pairs

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"upper": self.upper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        super().load_state_dict(state)
        self.upper.load_state_dict(state["upper"])

    def _weighting(self, layer: Any) -> Any:
        def multiply(factor: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return weighted(factor, output, self.method.component_weights(getattr(layer, VALUES)))

        return multiply


def with_values(model: nn.Module, value: float, of_layers: bool = False) -> nn.Module:
    """A PEFT LoRA model with values of its components, all the same at first; or one of each layer, (1,)."""
    import torch
    from peft.tuners.lora import LoraLayer
    from torch import nn

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            A = layer.lora_A[ADAPTER].weight
            values = torch.full((1 if of_layers else len(A),), value, dtype=A.dtype, device=A.device)
            layer.register_parameter(VALUES, nn.Parameter(values))
    return model
