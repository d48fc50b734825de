"""LoRA-Pro (Wang et al., 2025, arXiv 2407.18242): LoRA whose step moves the weight most like full fine-tuning's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from harness.errors import Diverged
from harness.method import Adaptation, Backbone, PeftForm, TrainData
from harness.optimizer import adamw
from methods.shared.lora_adaptation import LoraAdaptation
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit_at_rank
from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

Pair = tuple["Tensor", "Tensor"]  # of B, (m, r), and A, (r, n), or of what belongs to them
Solution = Literal["sylvester", "symmetry", "zero"]


class LoraPro(LoraMethod):
    """LoRA-Pro (Wang et al., 2025): a LoRA whose gradients are corrected, so that B A moves most like full fine-tuning.

    The update is s B A with s = alpha / rank. A change of B and A along g_B and g_A moves it along the equivalent
    gradient, s (B g_A + g_B A). The gradients are replaced by those whose equivalent gradient comes nearest to that of
    the weight, see `corrected`. mode=full keeps AdamW's moments for the equivalent gradient, as large as the weights,
    and takes its step back to B and A; mode=efficient corrects the gradients, and AdamW's moments are those of B and A.
    """

    provenance = "from the authors' code; that the frozen weights do not decay is ours"
    group = "fixed rank"
    capabilities = ("linear", "conv2d")

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(
        8, ge=1, description="rank of every adapted layer, at most its smaller side", json_schema_extra={"peft": "r"}
    )
    mode: Literal["full", "efficient"] = Field(
        "full", description="AdamW's moments: of the equivalent gradient, (m, n) a layer, or of B and A"
    )
    solution: Solution = Field(
        "sylvester",
        description="of the corrected gradients, which are many: those nearest to LoRA's own, those that share what "
        "B and A can both make alike, or those that leave it to A",
    )
    damping: float = Field(1e-8, ge=0, description="added to B^T B and A A^T before they are inverted")
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )
    rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank) instead", json_schema_extra={"peft": "use_rslora"}
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @property
    def scale(self) -> float:
        """s: what B A is multiplied by, in every layer."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA of the same rank and scale, with its own gradients."""
        return lora_form(ranks, self.scale, shared_parameters(self, self.dropout))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        return unfit_at_rank(backbone, self.target_modules, self.rank)

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: the memory of the whole moments."""
        if self.mode == "efficient":
            return []
        targets = backbone.targets(self.target_modules)
        weights = [backbone.module.get_parameter(f"{name}.weight") for name in targets]
        size = sum(2 * weight.numel() * weight.element_size() for weight in weights) / 2**20
        return [f"AdamW's moments are those of whole matrices: {size:,.1f} MiB for {len(targets)} layers"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.scale, self.dropout)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return LoraProAdaptation(self, model, optimizer, backbone, targets)


class LoraProAdaptation(LoraAdaptation):
    """One run. What differs from LoRA is done when the optimizer is about to step, after the gradients were clipped:
    corrected ones can be long while B is short, and would have the head's cut with them."""

    def __init__(
        self,
        method: LoraPro,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
    ) -> None:
        super().__init__(model, optimizer, backbone, targets)
        self.method = method
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Hook of the optimizer."""
        import torch

        found = [(layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight) for layer in self.layers.values()]
        pairs = [pair for pair in found if all(factor.grad is not None for factor in pair)]
        if not pairs:  # no loss reaches an adapted layer
            return
        with torch.no_grad():
            step = self._correct if self.method.mode == "efficient" else self._step_whole
            step(pairs, [(B.detach().flatten(1), A.detach().flatten(1)) for B, A in pairs])

    def _correct(self, parameters: list[Any], pairs: list[Pair]) -> None:
        """Replace the gradients; AdamW does the rest."""
        gradients = [(B.grad.flatten(1), A.grad.flatten(1)) for B, A in parameters]
        method = self.method
        new = corrected(pairs, gradients, method.scale, method.solution, method.damping)
        for factors, values in zip(parameters, new, strict=True):
            for factor, value in zip(factors, values, strict=True):
                factor.grad.copy_(value.reshape(factor.shape))

    def _step_whole(self, parameters: list[Any], pairs: list[Pair]) -> None:
        """AdamW's step of the weights along the equivalent gradient, taken back to B and A, which AdamW then leaves."""
        gradients = [(B.grad.flatten(1), A.grad.flatten(1)) for B, A in parameters]
        method, scale, back = self.method, self.method.scale, []
        first = corrected(pairs, gradients, scale, "zero", method.damping)  # the equivalent gradient has no X
        for (parameter, _), (B, A), (g_B, g_A) in zip(parameters, pairs, first, strict=True):
            change = self._adam(parameter, scale * (B @ g_A + g_B @ A))
            back.append((scale * change @ A.T, scale * B.T @ change))
        group = self.optimizer.param_groups[0]  # of the matrices
        # Both decay by a root, and so B A as a weight would.
        decay = math.sqrt(max(0.0, 1 - float(group["lr"]) * group["weight_decay"]))
        changes = corrected(pairs, back, scale, method.solution, method.damping)
        for factors, values in zip(parameters, changes, strict=True):
            for factor, value in zip(factors, values, strict=True):
                factor.mul_(decay).add_(value.reshape(factor.shape))
                factor.grad = None

    def _adam(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """What a step of AdamW without decay adds to a weight of this gradient, (m, n); the moments are kept as the
        optimizer's state of the layer's B."""
        import torch
        from torch.optim.adamw import adamw as adamw_step

        group, state = self.optimizer.param_groups[0], self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=gradient.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        change = torch.zeros_like(gradient)
        adamw_step(
            [change],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        return change


def corrected(
    pairs: Sequence[Pair], gradients: Sequence[Pair], scale: float, solution: Solution, damping: float
) -> list[Pair]:
    """The corrected gradients of each layer's B and A, in the dtype of the given ones.

    pairs: (B, A) of each layer, (m, r) and (r, n), all of one r. gradients: of them, g_B = s G A^T and g_A = s B^T G,
    where G, (m, n), is that of the weight, and s the scale. With P_B the projection onto the columns of B they are

        g_A' = (B^T B)^-1 g_A / s^2 + X A        g_B' = (I - P_B) g_B (A A^T)^-1 / s^2 - B X

    for any X, (r, r), since s (B g_A' + g_B' A) = P_B G + (I - P_B) G P_A, with P_A onto the rows of A, has none: of
    all s (B M + N A) the nearest to G. X is 0 for "zero". For "sylvester" it solves

        B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2

    which brings them nearest to g_A and g_B. For "symmetry", X = -(B^T B)^-1 B^T g_B (A A^T)^-1 / (2 s^2), half of
    P_B G P_A is made by each.

    damping is added to the diagonals before they are inverted; at 0 an inverse is the pseudo-inverse. B = 0 takes no
    case of its own: g_A' = 0 = g_A, and g_B' = g_B (A A^T)^-1 / s^2. Computed in float64, since B^T B has the square of
    B's condition number. Raises Diverged where a pair is not finite.
    """
    import torch

    B, A = ([pair[side].double() for pair in pairs] for side in (0, 1))
    grams = torch.stack([factor.T @ factor for factor in B] + [factor @ factor.T for factor in A])
    try:
        values, vectors = torch.linalg.eigh(grams)
    except torch.linalg.LinAlgError:
        raise Diverged("B and A of a layer are not finite") from None
    inverses = (vectors * _inverse(values, damping).unsqueeze(-2)) @ vectors.mT
    inverse_B, inverse_A = inverses.split(len(pairs))
    by_A = [inverse @ g_A.double() / scale**2 for inverse, (_, g_A) in zip(inverse_B, gradients, strict=True)]
    by_B = [g_B.double() @ inverse / scale**2 for inverse, (g_B, _) in zip(inverse_A, gradients, strict=True)]
    inner = torch.stack([factor.T @ part for factor, part in zip(B, by_B, strict=True)])
    shared = inverse_B @ inner  # P_B's part of g_B (A A^T)^-1 / s^2, in terms of B
    X = torch.zeros_like(shared)
    if solution == "symmetry":
        X = -0.5 * shared
    elif solution == "sylvester":
        right = -torch.stack([part @ factor.T for part, factor in zip(by_A, A, strict=True)])
        X = _sylvester(right, *values.split(len(pairs)), *vectors.split(len(pairs)))
    new = zip(B, A, by_B, by_A, shared, X, gradients, strict=True)
    return [
        ((part_B - b @ (both + x)).to(g_B.dtype), (part_A + x @ a).to(g_A.dtype))
        for b, a, part_B, part_A, both, x, (g_B, g_A) in new
    ]


def _inverse(values: Tensor, damping: float) -> Tensor:
    """Eigenvalues of the damped inverses, (layers, r); 0 for what is 0 but for rounding."""
    import torch

    damped = values.clamp_min(0) + damping
    least = values.shape[-1] * torch.finfo(values.dtype).eps * damped.amax(-1, keepdim=True)
    return torch.where(damped > least, 1 / damped, 0)


def _sylvester(right: Tensor, values_B: Tensor, values_A: Tensor, vectors_B: Tensor, vectors_A: Tensor) -> Tensor:
    """X with S X + X T = `right`, all (layers, r, r), by the eigenvalues, (layers, r), and eigenvectors of S and T,
    which are positive semidefinite; 0 where a sum of eigenvalues is."""
    import torch

    sums = values_B.clamp_min(0).unsqueeze(-1) + values_A.clamp_min(0).unsqueeze(-2)
    rotated = vectors_B.mT @ right @ vectors_A
    return vectors_B @ torch.where(sums > 0, rotated / sums, 0) @ vectors_A.mT
