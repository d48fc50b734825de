"""How often dEBORA finds planted ranks: a table per geometry, hypergradient and step rule.

    python scripts/planted_ranks.py [--seeds 20] [--settings "oblique direct"] [--set T_max=20 ...]

A frozen random network of 6 residual layers, and a target that is the same network plus a change of known rank (1 to
3, singular values 1) in 3 of the layers, drawn anew for every seed, without noise. Every layer starts at rank 4, one
simplex spans the network, and the harness's own loop trains the method as it would on a task. Counted over the seeds:

    layers     the layers that are left with a rank are the planted ones
    ranks      every layer's rank is the planted one
    effective  the same of the singular values above 0.1 of the trained update, whatever the rank that was allocated
    error      mean loss at the end over that of the frozen network
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from harness.method import Backbone
from harness.notation import parse_value
from harness.run.streams import TrainingData, seed_everything
from harness.run.training import Training
from harness.spec import TrainSpec
from harness.task import Batch
from methods.debora.method import Debora

NUM_LAYERS, WIDTH, ROWS, RANK = 6, 16, 4096, 4
EFFECTIVE = 0.1  # singular values above this count; the planted ones are 1

COMMON: dict[str, Any] = {
    "rank": RANK,
    "budget_scope": "global",
    "learning_rate": 1e-2,
    "T_max": 5,
    "step_size": 0.05,
    "search_fraction": 0.8,
    "iterations": 5,
}
FREE = {"geometry": "matrix", "tau": 16.0}
OBLIQUE, STIEFEL = ({"geometry": name, "tau": 6.0} for name in ("oblique", "stiefel"))  # s are singular values there
CLOSED_FORM, DIRECT = {"hypergradient": "closed_form"}, {"hypergradient": "direct"}
BACKTRACKING = {"hypergradient": "direct", "step_rule": "backtracking"}
IMPLICIT = {"hypergradient": "implicit"}
SETTINGS: dict[str, dict[str, Any]] = {
    "matrix closed_form": FREE | CLOSED_FORM,
    "matrix direct": FREE | DIRECT,
    "matrix direct backtracking": FREE | BACKTRACKING,
    "matrix implicit": FREE | IMPLICIT,
    "oblique direct": OBLIQUE | DIRECT,
    "oblique direct backtracking": OBLIQUE | BACKTRACKING,
    "oblique implicit": OBLIQUE | IMPLICIT,
    "stiefel direct": STIEFEL | DIRECT,
    "stiefel direct backtracking": STIEFEL | BACKTRACKING,
    "stiefel implicit": STIEFEL | IMPLICIT,
}


class Network(nn.Module):
    """h + tanh(W h), layer after layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, WIDTH) to (rows, WIDTH)."""
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Planted:
    """The problem of one seed, with the parts of a task that the loop asks for."""

    def __init__(self, seed: int) -> None:
        seed_everything(seed)
        self.network, target = Network().requires_grad_(False), Network().requires_grad_(False)
        target.load_state_dict(self.network.state_dict())
        self.ranks = [0] * NUM_LAYERS
        for position in torch.randperm(NUM_LAYERS)[:3].tolist():
            rank = self.ranks[position] = int(torch.randint(1, 4, ()))
            left, right = torch.linalg.qr(torch.randn(2, WIDTH, rank)).Q
            target.layers[position].weight += left @ right.T
        self.inputs = torch.randn(ROWS, WIDTH)
        self.targets = target(self.inputs)
        self.start = float((self.network(self.inputs) - self.targets).square().mean())

    def collate(self, encoded: Any, rows: Any, generator: Any) -> Batch:
        """See `harness.task.Task.collate`."""
        return Batch({"x": self.inputs[list(rows)]}, self.targets[list(rows)])

    def loss(self, model: nn.Module, batch: Batch, generator: Any) -> Tensor:
        """See `harness.task.Task.loss`; in units of the frozen network's."""
        return (model(**batch.inputs) - batch.labels).square().mean() / self.start


class Outcome(NamedTuple):
    """What one seed came to."""

    layers: bool
    ranks: bool
    effective: bool
    total: int
    error: float


def solve(parameters: dict[str, Any], seed: int, batches: int) -> Outcome:
    """Train one setting on one seed's problem."""
    problem = Planted(seed)
    planted = problem.ranks
    names = tuple(f"layers.{position}" for position in range(NUM_LAYERS))
    train = TrainSpec(batches=batches, batch_size=64, warmup=0.0, schedule="linear", clip_norm=0.0)
    data = TrainingData(ROWS, train.batch_size, seed)
    method = Debora.of(parameters, "debora")
    backbone = Backbone(problem.network, head=(), layers=names)
    adaptation: Any = method.start(backbone, train, data, torch.Generator().manual_seed(seed))
    task: Any = problem
    training = Training(adaptation, task, None, data, train, torch.device("cpu"), batches)
    training.run(lambda training: None)
    ranks = list(adaptation.ranks().values())
    updates = [layer.get_delta_weight("default").detach() for layer in adaptation.layers.values()]
    effective = [int((torch.linalg.svdvals(update) > EFFECTIVE).sum()) for update in updates]
    with torch.no_grad():
        error = float(problem.loss(adaptation.model, problem.collate(None, range(ROWS), None), None))
    found = [rank > 0 for rank in ranks] == [rank > 0 for rank in planted]
    return Outcome(found, ranks == planted, effective == planted, sum(ranks), error)


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--batches", type=int, default=3000, help="budget of a run")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--set", nargs="*", default=[], metavar="PARAMETER=VALUE", help="over every setting's own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = {key: parse_value(value) for key, _, value in (text.partition("=") for text in options.set)}
    rows = []
    for name in options.settings:
        started = time.perf_counter()
        parameters = COMMON | SETTINGS[name] | given
        outcomes = [solve(parameters, seed, options.batches) for seed in range(options.seeds)]
        columns = Outcome(*zip(*outcomes, strict=True))
        counts = [f"{sum(column)} of {options.seeds}" for column in columns[:3]]
        means = [statistics.mean(columns.total), statistics.mean(columns.error)]
        rows.append([name, *counts, *means, (time.perf_counter() - started) / options.seeds])
        print(rows[-1], flush=True)
    planted = statistics.mean(sum(Planted(seed).ranks) for seed in range(options.seeds))
    print(f"planted: {planted:.1f} components in 3 of {NUM_LAYERS} layers on average")
    headers = ["setting", "layers", "ranks", "effective", "components", "error", "seconds a run"]
    print(tabulate(rows, headers, floatfmt=".3g"))


if __name__ == "__main__":
    main()
