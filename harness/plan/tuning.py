"""The same search for every method: K trials over its own search space, scored on the holdout.

The first trial is the setting as given, with the defaults for the rest. The others spread evenly over the space:
a scrambled Sobol sequence, by Optuna's quasi-Monte Carlo sampler through Ray Tune's `OptunaSearch`. It covers the whole
range with a few trials, and looks at no score: so all trials of all methods run at once, and what is tried
depends on neither the executor nor the number of workers. A search that is started again finds its trials in the store,
and one with a larger K begins with those of the smaller. All trials share one seed, which is no seed of the report.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any, Self

from harness.errors import InputError
from harness.method import Method
from harness.parameters import Range, SearchSpace
from harness.plan.sweep import TRIAL_SEED
from harness.record.store import RecordStore
from harness.spec import RunSpec, Search


class MethodSearch:
    """The search of one method on one task.

    Raises InputError for a method whose search space is wrong, or whose learning rate is already fixed.
    """

    def __init__(self, method: Method, template: RunSpec, number: int) -> None:
        self.template = template
        self.space = _space(template.method, method)
        self.points = self._points(method, number)

    def waiting_for(self, parents: dict[str, str]) -> Self:
        """The same search, whose trials take ranks or sizes from these runs: see `RunSpec.parents`."""
        other = copy.copy(self)
        other.template = self.template.model_copy(update={"parents": parents})
        other.__dict__.pop("trials", None)
        return other

    @functools.cached_property
    def trials(self) -> list[RunSpec]:
        """The runs to try."""
        role = Search(role="trial", parameters=tuple(self.space))
        return [self._spec(values, TRIAL_SEED, role) for values in self.points]

    def chosen(self, store: RecordStore) -> RunSpec:
        """The template at the best setting so far; of equals, or where no trial gave a score, at the first."""
        trials = self.trials
        search = Search(role="chosen", parameters=tuple(self.space), trials=tuple(spec.run_id for spec in trials))
        best = max(trials, key=lambda spec: _merit(store, spec))
        return self._spec({name: best.method_parameters[name] for name in self.space}, self.template.seed, search)

    def _points(self, method: Method, number: int) -> list[dict[str, Any]]:
        """The settings to try, the one as given first."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        start = {name: self.template.method_parameters[name] for name in self.space}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.QMCSampler(scramble=True, seed=0)
        searcher = OptunaSearch(
            {name: _distribution(method, name, values) for name, values in self.space.items()},
            metric="merit",
            mode="max",
            points_to_evaluate=[start],
            sampler=sampler,
        )
        points = []
        for place in range(number):
            suggested = searcher.suggest(str(place))
            assert isinstance(suggested, dict)
            points.append({name: _rounded(value) for name, value in suggested.items()})
            # the sampler takes the space from a trial that has ended, and looks at no score
            searcher.on_trial_complete(str(place), {"merit": 0.0})
        return points

    def _spec(self, values: dict[str, Any], seed: int, search: Search) -> RunSpec:
        parameters = self.template.method_parameters | values
        return self.template.model_copy(update={"method_parameters": parameters, "seed": seed, "search": search})


def _merit(store: RecordStore, spec: RunSpec) -> float:
    record = store.read(spec.run_id)
    if record is None or record.status != "done":
        return float("-inf")
    return record.merit(record.holdout[record.headline])


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
