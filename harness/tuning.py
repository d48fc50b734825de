"""The same search for every method: K trials over its own search space, scored on the holdout.

Optuna's sampler proposes the settings (through Ray Tune's `OptunaSearch`). The first trial is the setting as given,
with the defaults for the rest. Trials come in generations of a fixed size, and their scores are told in order: what is
proposed depends on neither the executor nor the number of workers, a search that is started again finds its trials in
the store, and one with a larger K begins with those of the smaller. All trials share one seed, which is no seed of the
report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.method import Method
from harness.parameters import Range, SearchSpace
from harness.plan import Sweep, cell_of
from harness.record import RecordStore
from harness.spec import RunSpec, Search

if TYPE_CHECKING:
    from harness.preflight import CheckedMethod

SEED = 1_000_000  # of every trial
GENERATION = 4  # trials of a search that run at a time


class MethodSearch:
    """The search of one method on one task.

    Raises InputError for a method whose search space is wrong, or whose learning rate is already fixed.
    """

    def __init__(self, method: Method, template: RunSpec) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.template = template
        self.space = _space(template.method, method)
        self.tried: list[RunSpec] = []
        self.best: tuple[float, dict[str, Any]] | None = None
        start = {name: template.method_parameters[name] for name in self.space}
        self.searcher = OptunaSearch(
            {name: _distribution(method, name, values) for name, values in self.space.items()},
            metric="merit",
            mode="max",
            points_to_evaluate=[start],
            seed=0,
        )

    def propose(self, number: int) -> list[RunSpec]:
        """The next trials."""
        specs = []
        for _ in range(number):
            suggested = self.searcher.suggest(str(len(self.tried)))
            assert isinstance(suggested, dict)
            spec = self._spec(
                {name: _rounded(value) for name, value in suggested.items()},
                SEED,
                Search(role="trial", parameters=tuple(self.space)),
            )
            self.tried.append(spec)
            specs.append(spec)
        return specs

    def tell(self, specs: Sequence[RunSpec], store: RecordStore) -> None:
        """The trials' scores, from their records. One that gave none is a failure to the sampler."""
        first = len(self.tried) - len(specs)
        for number, spec in enumerate(specs, start=first):
            record = store.read(spec.run_id)
            if record is None or record.status != "done":
                self.searcher.on_trial_complete(str(number), error=True)
                continue
            merit = record.merit(record.holdout[record.headline])
            self.searcher.on_trial_complete(str(number), {"merit": merit})
            if self.best is None or merit > self.best[0]:
                self.best = merit, {name: spec.method_parameters[name] for name in self.space}

    def chosen(self, seed: int) -> RunSpec:
        """The run of the best setting; of the setting as given, where no trial gave a score."""
        trials = tuple(spec.run_id for spec in self.tried)
        search = Search(role="chosen", parameters=tuple(self.space), trials=trials)
        return self._spec(self.best[1] if self.best else {}, seed, search)

    def _spec(self, values: dict[str, Any], seed: int, search: Search) -> RunSpec:
        parameters = self.template.method_parameters | values
        return self.template.model_copy(update={"method_parameters": parameters, "seed": seed, "search": search})


def tune(
    searches: Sequence[MethodSearch], trials: int, carry_out: Callable[[list[RunSpec]], None], store: RecordStore
) -> None:
    """Give each search its trials. `carry_out` makes the records of those that have none."""
    for first in range(0, trials, GENERATION):
        number = min(GENERATION, trials - first)
        proposed = [search.propose(number) for search in searches]
        carry_out([spec for specs in proposed for spec in specs])
        for search, specs in zip(searches, proposed, strict=True):
            search.tell(specs, store)


def searches_of(sweep: Sweep, planned: Sequence[tuple[RunSpec, CheckedMethod]]) -> list[MethodSearch]:
    """A search for each method on each task that it supports. `planned`: see `plan_checked`.

    Raises InputError where a seed of the report is that of the trials.
    """
    if SEED in sweep.seeds:
        raise InputError(f"--seeds {SEED} is the seed of the trials of --tune: give another", str(SEED))
    first = [(spec, cell) for spec, cell in planned if spec.seed == sweep.seeds[0]]
    return [MethodSearch(cell.method, spec) for spec, cell in first if cell.reason is None]


def chosen(searches: Sequence[MethodSearch], specs: Sequence[RunSpec]) -> list[RunSpec]:
    """The plan with the chosen setting in every run that was searched for."""
    found = {cell_of(search.template): search for search in searches}
    return [found[cell].chosen(spec.seed) if (cell := cell_of(spec)) in found else spec for spec in specs]


def missing(
    searches: Sequence[MethodSearch], trials: int, specs: Sequence[RunSpec], store: RecordStore
) -> list[RunSpec]:
    """What has no record yet: trials, then runs of the plan with the chosen settings.

    Trials that will be proposed from scores which are not there yet stand in it as the search's first.
    """
    left: list[RunSpec] = []
    for search in searches:
        for first in range(0, trials, GENERATION):
            proposed = search.propose(min(GENERATION, trials - first))
            without = [spec for spec in proposed if store.read(spec.run_id) is None]
            if without:
                left += [*without, *[search.tried[0]] * (trials - len(search.tried))]
                break
            search.tell(proposed, store)
    return left + [spec for spec in chosen(searches, specs) if store.read(spec.run_id) is None]


def _space(name: str, method: Method) -> SearchSpace:
    """The hyperparameters to search over: those of the method's space that the user has not fixed."""
    space = dict(method.search_space)
    if "learning_rate" not in space or not space.keys() <= type(method).model_fields.keys():
        raise InputError(
            f"search_space of method '{name}' is {sorted(space)}: it should hold learning_rate and other "
            "hyperparameters of the method"
        )
    if "learning_rate" in method.model_fields_set:
        raise InputError(f"{name}.learning_rate is fixed, and --tune searches over it: drop one of them")
    return {parameter: values for parameter, values in space.items() if parameter not in method.model_fields_set}


def _distribution(method: Method, name: str, values: Range | tuple[Any, ...]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Range):
        return CategoricalDistribution(values)
    if type(method).model_fields[name].annotation is int:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _rounded(value: Any) -> Any:
    """Three digits of a number are enough, and can be read."""
    return float(f"{value:.3g}") if isinstance(value, float) else value
