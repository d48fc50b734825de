"""How often a method finds planted ranks: a table with a row for each method, in the notation of a run.

    python scripts/planted_ranks.py --methods "lora,adalora[components=planted],debora[geometry=oblique]"
        [--seeds 40-59] [--set T_max=20 ...] [--sweep step_size=0.02,0.05] [--noise [SIGMA]] [--wide] [--jobs 4]

A frozen random network of 6 residual layers, and a target that is the same network plus a change of known rank (1 to
3, singular values 1) in 3 of the layers, drawn anew for every seed. The harness's own loop trains a method on it, in
3000 batches of 64, whatever it uses them for; its learning rate falls linearly to 0. Counted over the seeds:

    layers      the layers that are left with a rank are the planted ones
    ranks       every layer's rank is the planted one
    effective   the same of the singular values above 0.1 of the trained update, whatever the rank that was allocated
    components  left in all layers together: mean
    error       loss at the end over that of the frozen network, without label noise: median and mean
    batches     before the first update + of updates + beside them (upper levels, trial points): means
    CPU s       of a run, on one core: median

A method that allocates no ranks is rounded: what is left of its update are the singular values above 0.1. One that
cannot work on the problem, diverges or fails on a seed has a remark; the seed counts as one where nothing is found.

Every method is given the learning rate 0.01 and, where it has such parameters, rank 4 and alpha 8/3, by which a LoRA's
update is scaled by 2/3; the table says what some are given beside. All else is at its default. Other values go into a
method's brackets, or for all of them into --set. To choose a learning rate for each: --sweep
learning_rate=1e-3,3e-3,1e-2,3e-2 on seeds 0-19, and each method with its best one on other seeds.

What a method is told of the problem is a word among these values, or a number times it:

    planted         components that are planted, for an oracle: components=planted, components=2*planted
    planted_layers  layers that are changed
    num_layers      layers of the network: tau=8/3*num_layers

The table is Markdown, on stdout; progress goes to stderr. Without --methods it is of dEBORA's variants and rivals.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from planted_problem import ROWS, SMALL, WIDE, Planted, Size
from tabulate import tabulate
from torch import Tensor

from harness.errors import Diverged, InputError
from harness.execute.machine import usable_cpus
from harness.method import Adaptation, Finished, Method
from harness.notation import label, parse_choice, parse_value, split_list
from harness.registry import make_method, method_class
from harness.run.streams import TrainingData
from harness.run.training import Training
from harness.spec import TrainSpec

RANK, BATCHES = 4, 3000
EFFECTIVE = 0.1  # singular values above this count; the planted ones are 1
NOISY = 1.0  # label noise over what is to be learnt: singular values of noise reach 0.3 in plain LoRA
HEADERS = ["method", "layers", "ranks", "effective", "components", "median error", "mean error", "batches", "CPU s"]
SCALE = 8 / 3  # alpha: divided by the rank, a component has 2 / 3, the scale of dEBORA's s in the rows of the paper
COMMON = {"learning_rate": 1e-2, "rank": RANK, "alpha": SCALE}  # of these what a method has
# PEFT divides its alpha by the rank twice. At 0.85, beta's default, it was wrong on seeds 3, 4 and 5 of 0 to 5.
ADALORA = f"adalora[init_rank={RANK},target_rank=2,alpha={RANK * SCALE},tfinal=0.2,beta1=0.99,beta2=0.99]"
GIVEN = dict(map(parse_choice, (ADALORA, "pruned_lora[prune_at=0.8]")))
# The paper leaves open how long it searches and over which simplex: as was best for its hypergradients here.
PAPER = "recipe=paper,budget_scope=global,search_fraction=0.8,T_max=5"
TAU = "tau=8/3*num_layers"  # s starts at 2 / 3
UNIT = "tau=2*planted_layers"  # on manifolds s are singular values, so that tau is told what is planted on average
METHODS = [
    "debora",
    "debora[components=planted]",
    "debora[hypergradient=path,T_max=10]",
    "debora[hypergradient=direct,T_max=5]",
    f"debora[geometry=oblique,{UNIT}]",
    f"debora[geometry=stiefel,{UNIT}]",
    f"debora[{PAPER},{TAU}]",
    f"debora[{PAPER},geometry=oblique,{UNIT}]",
    f"debora[{PAPER},geometry=stiefel,{UNIT}]",
    f"debora[{PAPER},{TAU},hypergradient=implicit,iterations=5,step_rule=fixed,step_size=0.05]",
    "lora",
    "adalora[components=planted]",
    "pruned_lora[components=planted]",
    "pruned_lora[components=planted,selection=random]",
]


class Run(NamedTuple):
    """A method in the notation of a run, with the parameters `given` over its own, on the problem of a seed."""

    text: str
    given: dict[str, Any]
    seed: int
    batches: int = BATCHES
    size: Size = SMALL
    noise: float = 0.0

    @property
    def name(self) -> str:
        """What the table calls it."""
        name, parameters = parse_choice(self.text)
        return label(name, parameters | self.given)

    @property
    def train(self) -> TrainSpec:
        """The budget, the same for every method."""
        return TrainSpec(batches=self.batches, batch_size=64, warmup=0.0, schedule="linear", clip_norm=0.0)

    def method(self, problem: Planted) -> Method:
        """What is to be trained. Raises InputError for parameters that are not allowed."""
        name, parameters = parse_choice(self.text)
        fields, own_names = method_class(name).model_fields, method_class(name).peft_names()
        common = {key: value for key, value in COMMON.items() if key in fields and fields[key].default is not None}
        values = common | GIVEN.get(name, {})
        values |= {own_names.get(key, key): value for key, value in (parameters | self.given).items()}
        return make_method(name, {key: problem.told(value) for key, value in values.items()})

    def fitting_method(self, problem: Planted) -> Method:
        """`method`, ready for the problem. Raises InputError with the reason where it cannot work on it."""
        seen = problem.backbone()
        seen.module = copy.deepcopy(problem.network).to("meta")  # as when runs are planned
        method = self.method(problem).resolve(seen, no_run)
        if method.parents:
            raise InputError(f"{', '.join(method.parents)} names another configuration, and there is none here")
        if (reason := method.unsupported(seen)) is not None:
            raise InputError(reason)
        method.notes(seen, self.train, ROWS)  # raises for what does not fit into the budget
        return method


class Outcome(NamedTuple):
    """What one seed came to."""

    layers: bool
    ranks: bool
    effective: bool
    total: int
    error: float
    before: int  # batches used before the first update
    updates: int
    beside: int  # batches that were neither
    seconds: float


def solve(run: Run) -> Outcome | str:
    """Train a method on one seed's problem; or say why that is not possible."""
    try:
        return outcome_of(run)
    except (InputError, Diverged) as error:
        return f"seed {run.seed}: {error}"
    except Exception as error:  # one method's mistake costs no other row
        traceback.print_exc()
        return f"seed {run.seed}: {type(error).__name__}: {error}"


def outcome_of(run: Run) -> Outcome:
    """`solve`, which raises what goes wrong."""
    started = time.process_time()
    problem = Planted(run.seed, run.size, run.noise)
    method, planted = run.fitting_method(problem), problem.ranks
    training, before = trained(method, problem, run)
    ranks, effective, change = found(training.adaptation, method, problem)
    placed = [rank > 0 for rank in ranks] == [rank > 0 for rank in planted]
    spent = before, training.index, training.used - before - training.index
    error, seconds = problem.error(change), time.process_time() - started
    return Outcome(placed, ranks == planted, effective == planted, sum(ranks), error, *spent, seconds)


def trained(method: Method, problem: Planted, run: Run) -> tuple[Training, int]:
    """The method at the end of its budget, and how much of that it used before the first update."""
    train = run.train
    data = TrainingData(ROWS, train.batch_size, run.seed, upper_share=method.upper_share)
    adaptation = method.start(problem.backbone(), train, data, torch.Generator().manual_seed(run.seed))
    task: Any = problem
    training = Training(adaptation, task, None, data, train, torch.device("cpu"), run.batches)
    training.prepare()
    before = training.used
    training.run(lambda training: None)
    return training, before


@torch.no_grad()
def found(adaptation: Adaptation, method: Method, problem: Planted) -> tuple[list[int], list[int], Tensor]:
    """Every layer's rank, its number of singular values that count, and the change of the weights that is left.

    Raises InputError where the trained model is not the network with changed weights."""
    model, change = adaptation.model.eval(), problem.change()
    away = (model(x=problem.inputs) - problem.output(change)).square().mean() / problem.start
    if away > 1e-6:
        raise InputError("what is trained is no change of the layers' weights: there are no ranks to compare")
    U, sigma, Vh = torch.linalg.svd(change)
    counted = sigma > EFFECTIVE
    effective = counted.sum(1).tolist()
    ranks = adaptation.ranks()
    if "rank-adaptive" not in method.capabilities or not ranks:
        return effective, effective, U * (sigma * counted)[:, None] @ Vh
    return [ranks.get(name, 0) for name in problem.backbone().layers], effective, change


def no_run(run_id: str) -> Finished:
    """See `harness.method.FinishedRun`."""
    raise InputError(f"'{run_id}' names an earlier run, and there is none here")


def solved(runs: list[Run], jobs: int) -> Iterator[Outcome | str]:
    """The runs' outcomes in their order, each process with one thread."""
    if jobs == 1:
        torch.set_num_threads(1)
        yield from map(solve, runs)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(solve, runs)


def seeds_of(text: str) -> list[int]:
    """A count ("20"), or a list of seeds and ranges ("40-59", "3,", "0,2,4-6"), as argparse takes it."""
    seeds: list[int] = []
    if text.isdecimal():
        seeds = list(range(int(text)))
    elif re.fullmatch(r"(\d+(-\d+)?(,|$))+", text):
        for first, _, last in (part.partition("-") for part in text.split(",") if part):
            seeds += range(int(first), int(last or first) + 1)
    if not seeds:
        raise argparse.ArgumentTypeError(f"'{text}' is not allowed: give a count (20), a range (40-59) or a list (0,2)")
    return seeds


def checked(options: argparse.Namespace) -> dict[str, list[Run]]:
    """The rows' names and their runs: every method with what --set and --sweep give it, on every seed.

    Raises InputError for a number out of its range, a name that no method has, and parameters that it does not take.
    """
    for name, least in (("batches", 1), ("noise", 0), ("jobs", 1)):
        if not getattr(options, name) >= least:
            raise InputError(f"--{name} {getattr(options, name)} is not allowed: it is at least {least}")
    given = parse_choice(f"--set[{','.join(options.set)}]")[1]
    key, _, values = (options.sweep or "=").partition("=")
    swept: list[dict[str, Any]] = [{key: parse_value(value)} for value in split_list(values)]
    if options.sweep and not (key and swept):
        raise InputError(f"--sweep '{options.sweep}' cannot be read: write parameter=value,value")
    rows, common = {}, (options.batches, options.size, options.noise)
    for text, each in itertools.product(split_list(options.methods), swept or [{}]):
        runs = [Run(text, given | each, seed, *common) for seed in options.seeds]
        runs[0].method(Planted(runs[0].seed, options.size))
        rows[runs[0].name] = runs
    return rows


def row_of(name: str, outcomes: list[Outcome | str]) -> list[Any]:
    """A row of the table: `Outcome`'s over the seeds, with a remark where some have none."""
    ended = [each for each in outcomes if isinstance(each, Outcome)]
    reasons = [each for each in outcomes if isinstance(each, str)]
    remark = [f"no result on {len(reasons)} of {len(outcomes)}; {reasons[0]}"] if reasons else []
    if not ended:
        return [name, *[None] * (len(HEADERS) - 1), *remark]
    columns, mean, median = Outcome(*zip(*ended, strict=True)), statistics.mean, statistics.median
    counts = [f"{sum(column)} of {len(outcomes)}" for column in columns[:3]]
    spent = " + ".join(f"{mean(column):.0f}" for column in (columns.before, columns.updates, columns.beside))
    errors = median(columns.error), mean(columns.error)
    return [name, *counts, mean(columns.total), *errors, spent, median(columns.seconds), *remark]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default="0-19", help="a count, a range or a list (20, 40-59, 0,2)")
    parser.add_argument("--batches", type=int, default=BATCHES, help="budget of a run, whatever they are used for")
    methods = "names with their parameters, as `python -m harness run` takes them"
    parser.add_argument("--methods", default=",".join(METHODS), metavar="NAME[PARAMETER=VALUE],...", help=methods)
    parser.add_argument("--set", nargs="*", default=[], metavar="PARAMETER=VALUE", help="over every method's own")
    parser.add_argument("--sweep", metavar="PARAMETER=VALUE,VALUE", help="a row of every method for each value")
    noise = f"label noise over the standard deviation of what is to be learnt; without a number {NOISY:g}"
    parser.add_argument("--noise", nargs="?", type=float, const=NOISY, default=0.0, metavar="SIGMA", help=noise)
    wide = f"{WIDE.layers} layers of width {WIDE.width}, {WIDE.planted} of them changed"
    parser.add_argument("--wide", dest="size", action="store_const", const=WIDE, default=SMALL, help=wide)
    parser.add_argument("--jobs", type=int, default=usable_cpus(), help="processes; as many as there are CPUs")
    return parser


def main() -> None:
    """Print the table."""
    parser = arguments()
    options = parser.parse_args()
    try:
        rows = checked(options)
    except InputError as error:
        parser.error(str(error))
    size, seeds, table = options.size, options.seeds, []
    outcomes = solved(list(itertools.chain(*rows.values())), options.jobs)
    for name in rows:
        of_row: list[Outcome | str] = []
        for outcome in itertools.islice(outcomes, len(seeds)):
            of_row.append(outcome)
            print(f"\r{name}: {len(of_row)} of {len(seeds)}", end="", file=sys.stderr, flush=True)
        table.append(row_of(name, of_row))
        print("\r" + tabulate(table[-1:], tablefmt="plain", floatfmt=".3g"), file=sys.stderr, flush=True)
    planted = statistics.mean(sum(Planted(seed, size).ranks) for seed in seeds)
    print(f"{planted:.1f} components in {size.planted} of {size.layers} layers, label noise {options.noise:g}")
    common, own = label("", COMMON), ", ".join(label(name, given) for name, given in GIVEN.items())
    print(f"{options.batches} batches each; given, unless a row says otherwise: of {common} what there is; {own}\n")
    headers = HEADERS + ["remark"] * any(len(row) > len(HEADERS) for row in table)
    print(tabulate(table, headers, tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    main()
