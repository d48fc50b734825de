"""The plan of a sweep: all that it runs, found to be in order before the first run and without writing anything.

`run` carries a plan out, `run --dry-run` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness import registry
from harness.method import Backbone, Finished, Method
from harness.plan import preflight
from harness.plan.preflight import CheckedTask
from harness.plan.sweep import Sweep, method_cells, spec_of
from harness.plan.tuning import MethodSearch
from harness.record.store import RecordStore
from harness.spec import Place, RunSpec


@dataclass(frozen=True)
class Cell:
    """A method on a task: what runs once a seed.

    method: as it was resolved for the task's backbone, see `Method.resolve`.
    template: the run at the sweep's first seed, before any search.
    reason: why the method cannot work on the backbone, or None; its runs are recorded as unsupported.
    notes: what the method says of its runs, a line each.
    search: the search of the cell's hyperparameters, where there is one.
    """

    method: Method
    task: CheckedTask
    template: RunSpec
    reason: str | None = None
    notes: tuple[str, ...] = ()
    search: MethodSearch | None = None

    @property
    def label(self) -> str:
        """The method as the tables name it: "debora[tau=8]"."""
        return registry.label_of(self.template.method, self.template.method_parameters)

    def runs(self, seeds: tuple[int, ...], store: RecordStore) -> list[RunSpec]:
        """A run for each seed; after a search at the best setting so far."""
        spec = self.template if self.search is None else self.search.chosen(store)
        return [spec.model_copy(update={"seed": seed}) for seed in seeds]


@dataclass(frozen=True)
class Planned:
    """A sweep that was found to be in order.

    cells: all methods of a task before the next task; cells that became the same run are one.
    said: what is to be said of the models, a line each.
    """

    sweep: Sweep
    place: Place
    tasks: tuple[CheckedTask, ...]
    cells: tuple[Cell, ...]
    said: tuple[str, ...]

    @property
    def searches(self) -> list[MethodSearch]:
        """The searches of the cells that have one."""
        return [cell.search for cell in self.cells if cell.search is not None]

    @property
    def trials(self) -> list[RunSpec]:
        """The trials of all searches: the first of every search, then the second, and so on."""
        return [spec for turn in zip(*(search.trials for search in self.searches), strict=True) for spec in turn]

    def runs(self, store: RecordStore) -> list[RunSpec]:
        """The runs of the report, all cells of a seed before the next seed. Those of a cell with a search change until
        the records of its trials are in the store."""
        columns = [cell.runs(self.sweep.seeds, store) for cell in self.cells]
        return [spec for turn in zip(*columns, strict=True) for spec in turn]

    def stages(self, store: RecordStore) -> Iterator[list[RunSpec]]:
        """What to carry out, one list after the other: take the next one when the records of the last are there, since
        its runs may follow from them. The last list is that of the report."""
        if self.trials:
            yield self.trials
        yield self.runs(store)

    @property
    def summaries(self) -> list[str]:
        """What was read of every task, a few lines each: see `Data.summary`."""
        return [line for task in self.tasks for line in task.data.summary(task.name)]


def plan_sweep(sweep: Sweep, place: Place, store: RecordStore, *, try_models: bool) -> Planned:
    """The plan of a sweep. `store`: of the runs that methods refer to.

    try_models: load every model and put a few rows through it; else shapes and names of the models are enough.
    Raises InputError for whatever is wrong with a task, a model, or a method on one of them.
    """
    tasks = preflight.check_tasks(sweep, place)
    methods, cells = method_cells(sweep), {}

    def finished(run_id: str) -> Finished:
        record = store.find(run_id)
        return Finished(record.ranks, record.parameters)

    for task in tasks:
        backbone = task.meta_backbone(place)
        for name, given in methods:
            method = given.resolve(backbone, finished)
            spec = spec_of(sweep, place, (name, method), (task.name, task.task), task.fingerprints)
            if spec.run_id not in cells:
                cells[spec.run_id] = _cell(sweep, method, task, spec, backbone)
    said = preflight.check_models(tasks, sweep.train, place) if try_models else preflight.model_notes(tasks)
    return Planned(sweep, place, tuple(tasks), tuple(cells.values()), tuple(said))


def _cell(sweep: Sweep, method: Method, task: CheckedTask, spec: RunSpec, backbone: Backbone) -> Cell:
    """The cell of a method that was resolved for the task's backbone."""
    reason = method.unsupported(backbone)
    if reason is not None:
        return Cell(method, task, spec, reason)
    notes = tuple(method.notes(backbone, sweep.train, len(task.splits.train)))
    return Cell(method, task, spec, None, notes, MethodSearch(method, spec, sweep.tune) if sweep.tune else None)
