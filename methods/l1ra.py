"""L1RA (Singh et al., ICNLSP 2025, arXiv 2509.04884): gates under an L1 term, whose ranks go from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from harness.errors import InputError
from harness.method import RANK, RANKS, Adaptation, Backbone, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.gated_lora import GATE, GatedLora, GatedLoraAdaptation, add_gates, soft_threshold
from methods.shared.growing_lora import shared_out
from methods.shared.peft_model import lora_model, unfit
from methods.shared.placement import check_spread, spread
from methods.shared.shares import least_budget

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec


class L1ra(GatedLora):
    """L1RA (Singh et al., 2025): B diag(c) A, whose components at c = 0 are handed on to layers that lost none.

    The gates c start at 1, stay between 0 and 1, and train at a learning rate of their own, which is constant. After
    each step of AdamW an L1 term takes l1 times that rate off them, apart from the gradient. After every share `every`
    of the budget, components whose gate is below `prune_below` are removed; each layer keeps one. As many new
    ones, with c = 1, B = 0 and A drawn, go to the layers that lost none, in turn, first to the one whose smallest gate
    is largest. Neither the function nor the number of components changes, and the optimizer begins anew.

    Where every layer lost one, the authors' code drops the freed ranks. Here they go to those layers.
    """

    provenance = "from the authors' code; its optimizer's L1 step is AdamW's decay with a sign, and no rank is lost"
    traces: ClassVar[tuple[Trace, ...]] = (RANK, RANKS, Trace("handed_on", "components handed on"))

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(
        8,
        ge=1,
        description="rank of every adapted layer at the start, at most its smaller side; also in alpha / rank",
        json_schema_extra={"peft": "r"},
    )
    components: int | None = Field(
        None,
        ge=1,
        description="components of all layers together, spread evenly at the start, instead of rank in each; at least "
        "one for each layer",
    )
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )
    l1: float = Field(1e-3, ge=0, description="weight of the gates' L1 term, times their learning rate in each update")
    gate_learning_rate: float = Field(
        2e-2, ge=0, description="of the gates, the same in every update; 0: they stay at 1"
    )
    every: float = Field(0.1, gt=0, lt=1, description="share of the budget between two times that ranks are handed on")
    prune_below: float = Field(1e-10, gt=0, le=1, description="components with a smaller gate are removed")
    reassign: bool = Field(True, description="hand ranks on; false: those that are removed are gone")

    @property
    def scale(self) -> float:
        """See `GatedLora.scale`."""
        return self.alpha / self.rank

    def interval(self, budget: int) -> int:
        """Batches between two times that ranks are handed on. Raises InputError where it would be none."""
        if (found := int(self.every * budget)) > 0:
            return found
        least = least_budget(lambda batches: int(self.every * batches) > 0)
        raise InputError(
            f"every = {self.every:g} does not fit into {budget} batches: it takes at least {least}", "every"
        )

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        check_spread(self.components, self.rank, backbone, targets)
        return unfit(backbone, list(targets))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        budget = train.budget(num_examples)
        interval, targets = self.interval(budget), backbone.targets(self.target_modules)
        total, events = sum(spread(self.components, self.rank, targets).values()), (budget - 1) // interval
        when = f"every {interval} of {budget} batches, {events} times"
        what = f"those whose gate is 0 are {'handed on' if self.reassign else 'removed'} {when}"
        return [f"{total} components in {len(targets)} layers; {what}"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        import torch

        targets = backbone.targets(self.target_modules)
        ranks = spread(self.components, self.rank, targets)
        on_meta = next(backbone.module.parameters()).is_meta  # there, shapes alone: the init needs values
        init = True if on_meta else "gaussian"  # A of deviation 1 / (the layer's rank)
        model = lora_model(backbone, ranks, self.scale, self.dropout, init_lora_weights=init)
        add_gates(model, [torch.ones(rank) for rank in ranks.values()], trained=self.gate_learning_rate > 0)
        ratios = {f".{GATE}": self.gate_learning_rate / self.learning_rate} if self.gate_learning_rate else {}
        optimizer = adamw(model, self.learning_rate, self.weight_decay, ratios)
        adaptation = L1raAdaptation(self, model, optimizer, backbone, targets)
        with torch.no_grad():
            for (_, A), own in zip(adaptation.pairs(), ranks.values(), strict=True):
                A.mul_(own / self.rank)  # of deviation 1 / rank in every layer, as later ones
        return adaptation


class L1raAdaptation(GatedLoraAdaptation):
    """One run. A component that is held counts until it is removed, whatever its gate is; those at 0 go in the end."""

    method: L1ra

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`: the components that are held."""
        return {name: len(gate) for name, gate in self.gates().items()}

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`: the gates' learning rate follows no schedule."""
        gates = {id(gate) for gate in self.gates().values()}
        for group in self.optimizer.param_groups:
            if id(group["params"][0]) in gates:
                group["lr"] = self.method.gate_learning_rate

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. Where ranks were to be handed on, the history has how many were, and all."""
        method = self.method
        for gate in self.gates().values():
            gate.data.copy_(soft_threshold(gate.detach(), method.l1 * method.gate_learning_rate).clamp(0, 1))
        if step.used % method.interval(step.budget) or step.used == step.budget:
            return {}
        freed = self._hand_on(step)
        ranks = list(self.ranks().values())
        return {"rank": sum(ranks), "ranks": ranks, "handed_on": freed if method.reassign else 0}

    def finish(self, step: Step) -> None:
        """See `Adaptation.finish`: components at c = 0 add nothing, and are not kept."""
        self.keep([gate.nonzero().flatten().tolist() for gate in self.gates().values()])

    def keep(self, places: Sequence[Sequence[int]]) -> None:
        """See `CutLoraAdaptation.keep`; the gates go with their components."""
        import torch

        from methods.shared.optimizer_state import keep

        for gate, own in zip(self.gates().values(), places, strict=True):
            if len(own) < len(gate):
                keep(gate, torch.tensor(own, dtype=torch.int64, device=gate.device), 0, self.optimizer)
        super().keep(places)

    def _hand_on(self, step: Step) -> int:
        """Remove what is below the threshold, and give as many components to other layers. Returns how many."""
        gates = {name: gate.detach().cpu() for name, gate in self.gates().items()}
        kept = {name: above(gate, self.method.prune_below) for name, gate in gates.items()}
        lost = {name: len(gate) - len(kept[name]) for name, gate in gates.items()}
        freed = sum(lost.values())
        if freed == 0:
            return 0
        self.optimizer.state.clear()
        self.keep(list(kept.values()))
        if self.method.reassign:
            smallest = {name: float(gate[kept[name]].min()) for name, gate in gates.items()}
            order = sorted(gates, key=lambda name: (lost[name] > 0, -smallest[name]))
            unharmed = [name for name in order if lost[name] == 0]
            room = {name: min(self.sides(name)) - len(kept[name]) for name in order}
            self._grow(handed_out(freed, (unharmed, order), room), step)
        return freed

    def _grow(self, more: Mapping[str, int], step: Step) -> None:
        """Give layers so many new components, which add nothing yet: c is 1, B is 0, A is drawn."""
        import torch

        from methods.shared.optimizer_state import append

        gates = self.gates()
        for name, (B, A) in zip(self.targets, self.pairs(), strict=True):
            if number := more[name]:
                drawn = torch.randn(number, *A.shape[1:], generator=step.rng) / self.method.rank
                append(A, drawn.to(A), 0, self.optimizer)
                append(B, B.new_zeros(B.shape[0], number, *B.shape[2:]), 1, self.optimizer)
                append(gates[name], gates[name].new_ones(number), 0, self.optimizer)


def above(gates: torch.Tensor, threshold: float) -> list[int]:
    """The places of the gates that are not below the threshold; where all are, that of the largest."""
    return (gates >= threshold).nonzero().flatten().tolist() or [int(gates.argmax())]


def handed_out(number: int, takers: Sequence[Sequence[str]], room: Mapping[str, int]) -> dict[str, int]:
    """How many of `number` each layer gets: in turn, in the order of the first `takers`; of the next ones where all of
    these are full. room: how many a layer can take, by its name."""
    given = dict.fromkeys(room, 0)
    for names in takers:
        gains = shared_out(range(len(names)), [room[name] - given[name] for name in names], 1, number)
        number -= sum(gains)
        for name, gain in zip(names, gains, strict=True):
            given[name] += gain
    return given
