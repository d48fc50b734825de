"""The plan of a sweep: all that it runs, found to be in order before the first run and without writing anything.

`run` carries a plan out, `run --dry-run` prints it.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from harness import registry
from harness.backbone_dtype import check_library, unfit
from harness.errors import InputError
from harness.method import Backbone, Finished, Method
from harness.plan import preflight
from harness.plan.preflight import CheckedTask
from harness.plan.references import key_of, parents_of
from harness.plan.sweep import Sweep, method_cells, spec_of
from harness.plan.tuning import MethodSearch
from harness.record import cells as kept
from harness.record.store import RecordStore
from harness.spec import Place, RunSpec


@dataclass(frozen=True)
class Cell:
    """A method on a task: what runs once a seed.

    method: as it was resolved for the task's backbone, see `Method.resolve`.
    template: the run at the sweep's first seed, before any search.
    sized: the method at the sizes that are known now: of one that waits for others, those that they start with; None
    where these say nothing.
    reason: why the method cannot work on the backbone, or None; its runs are recorded as unsupported.
    notes: what the method says of its runs, a line each.
    search: the search of the cell's hyperparameters, where there is one.
    parents: the cells that it waits for, by the method's parameter that names them. Each run takes ranks or sizes from
    the parent's run of its seed, and each trial from that of the sweep's first seed: of trials' seed there is none.
    """

    method: Method
    task: CheckedTask
    template: RunSpec
    sized: Method | None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    search: MethodSearch | None = None
    parents: Mapping[str, Cell] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method as the tables name it: "debora[tau=8]"."""
        return registry.label_of(self.template.method, self.template.method_parameters)

    @functools.cached_property
    def level(self) -> int:
        """0 for a cell that waits for no other, else one more than the highest of its parents."""
        return max((1 + parent.level for parent in self.parents.values()), default=0)

    @functools.cached_property
    def at_start(self) -> Finished | None:
        """What a run starts with, from shapes alone; None where that is not known."""
        if self.sized is None:
            return None
        backbone = self.task.meta_backbone(self.template.place, self.template.train)
        return preflight.at_start(self.sized, backbone, self.template.train, len(self.task.splits.train))

    def runs(self, seeds: tuple[int, ...], store: RecordStore) -> list[RunSpec]:
        """A run for each seed; after a search at the best setting so far."""
        search = self._search(store)
        spec = self.template if search is None else search.chosen(store)
        if not self.parents:
            return [spec.model_copy(update={"seed": seed}) for seed in seeds]
        of_parents = {name: parent.runs(seeds, store) for name, parent in self.parents.items()}
        parents = [{name: runs[place].run_id for name, runs in of_parents.items()} for place in range(len(seeds))]
        return [
            spec.model_copy(update={"seed": seed, "parents": each}) for seed, each in zip(seeds, parents, strict=True)
        ]

    def trials(self, store: RecordStore) -> list[RunSpec]:
        """The trials of the search, none without one."""
        search = self._search(store)
        return [] if search is None else search.trials

    def is_fixed(self, store: RecordStore) -> bool:
        """Whether `runs` stay what they are now: the searches of this cell and of all that it waits for have ended."""
        if not all(parent.is_fixed(store) for parent in self.parents.values()):
            return False
        return all(store.skim(spec.run_id) is not None for spec in self.trials(store))

    def _search(self, store: RecordStore) -> MethodSearch | None:
        if self.search is None or not self.parents:
            return self.search
        first = (self.template.seed,)
        return self.search.waiting_for({name: cell.runs(first, store)[0].run_id for name, cell in self.parents.items()})


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

    def trials(self, store: RecordStore, level: int | None = None) -> list[RunSpec]:
        """The trials of all searches: the first of every search, then the second, and so on. `level`: of these cells
        alone."""
        columns = [trials for cell in self._at(level) if (trials := cell.trials(store))]
        return [spec for turn in zip(*columns, strict=True) for spec in turn]

    def runs(self, store: RecordStore, level: int | None = None) -> list[RunSpec]:
        """The runs of the report, all cells of a seed before the next seed. Those of a cell with a search, and of all
        that wait for it, change until the records of its trials are in the store. `level`: of these cells alone."""
        columns = [cell.runs(self.sweep.seeds, store) for cell in self._at(level)]
        return [spec for turn in zip(*columns, strict=True) for spec in turn]

    def stages(self, store: RecordStore) -> Iterator[list[RunSpec]]:
        """What to carry out, one list after the other: take the next one when the records of the last are there, since
        its runs may follow from them. Trials come before the runs of their search, and cells before those that wait for
        them. The last list is that of the report."""
        highest = max(cell.level for cell in self.cells)
        for level in range(highest + 1):
            if trials := self.trials(store, level):
                yield trials
            yield self.runs(store, level if level < highest else None)

    def waiting(self, specs: Collection[RunSpec], store: RecordStore) -> list[kept.Cell]:
        """The runs beside a stage's `specs` that wait for others, as `status` counts them."""
        here, found = {spec.run_id for spec in specs}, []
        for cell in self.cells:
            if not cell.parents:
                continue
            fixed, others = cell.is_fixed(store), ", ".join(parent.label for parent in cell.parents.values())
            for spec in cell.runs(self.sweep.seeds, store):
                if spec.run_id not in here:
                    run_id = spec.run_id if fixed else ""
                    found.append(kept.Cell(run_id, cell.label, cell.task.name, spec.seed, others))
        return found

    def _at(self, level: int | None) -> list[Cell]:
        return [cell for cell in self.cells if level in (None, cell.level)]

    @property
    def summaries(self) -> list[str]:
        """What was read of every task, a few lines each: see `Data.summary`."""
        return [line for task in self.tasks for line in task.data.summary(task.name)]


def plan_sweep(sweep: Sweep, place: Place, store: RecordStore, *, try_models: bool) -> Planned:
    """The plan of a sweep. `store`: of the runs that methods refer to.

    try_models: load every model and put a few rows through it; else shapes and names of the models are enough.
    Raises InputError for whatever is wrong with a task, a model, or a method on one of them.
    """
    check_library(sweep.train.backbone_dtype)
    tasks = preflight.check_tasks(sweep, place)
    cells: dict[str, Cell] = {}
    for task in tasks:
        cells |= _cells_of(sweep, place, task, store)
    said = preflight.check_models(tasks, sweep.train, place) if try_models else preflight.model_notes(tasks)
    return Planned(sweep, place, tuple(tasks), tuple(cells.values()), tuple(said))


def _cells_of(sweep: Sweep, place: Place, task: CheckedTask, store: RecordStore) -> dict[str, Cell]:
    """The cells of a task by their templates' run_ids, each after those that it waits for."""
    methods = {key_of(named): named for named in method_cells(sweep)}
    backbone = task.meta_backbone(place, sweep.train)
    cells: dict[str, Cell] = {}
    by_key: dict[str, Cell] = {}  # the same cells; methods that become one run have one

    def finished(run_id: str) -> Finished:
        record = store.find(run_id)
        return Finished(record.ranks, record.parameters)

    def make(key: str) -> Cell:
        if key not in by_key:
            name, given = methods[key]
            parents = {parameter: make(parent) for parameter, parent in parents_of(methods[key]).items()}
            method = given.resolve(backbone, finished)
            spec = spec_of(sweep, place, (name, method), (task.name, task.task), task.fingerprints)
            if parents:
                waited = {parameter: parent.template.run_id for parameter, parent in parents.items()}
                spec = spec.model_copy(update={"parents": waited})
            if spec.run_id not in cells:
                cells[spec.run_id] = _cell(sweep, method, task, spec, backbone, parents)
            by_key[key] = cells[spec.run_id]
        return by_key[key]

    for key in methods:
        make(key)
    return cells


def _cell(
    sweep: Sweep, method: Method, task: CheckedTask, spec: RunSpec, backbone: Backbone, parents: Mapping[str, Cell]
) -> Cell:
    """The cell of a method that was resolved for the task's backbone."""
    if parents:
        reason, sized, notes = _awaited(method, spec, backbone, parents)
    else:
        reason, sized, notes = unfit(method, backbone), method, []
    if reason is not None:
        return Cell(method, task, spec, None, reason, parents=parents)
    if sized is not None:
        said = sized.notes(backbone, sweep.train, len(task.splits.train))
        notes = notes or said  # those of sizes that will be others say too much
    is_given = (
        bool(parents) and "learning_rate" in method.model_fields_set
    )  # a control with the rate of what it controls
    search = MethodSearch(method, spec, sweep.tune) if sweep.tune and not is_given else None
    return Cell(method, task, spec, sized, None, tuple(notes), search, parents)


def _awaited(
    method: Method, spec: RunSpec, backbone: Backbone, parents: Mapping[str, Cell]
) -> tuple[str | None, Method | None, list[str]]:
    """Of a method that waits for others: why it cannot work, its sizes as far as they are known, and what to say."""
    label = registry.label_of(spec.method, spec.method_parameters)
    notes = [f"waits for {', '.join(parent.label for parent in parents.values())}"]
    for parent in parents.values():
        if parent.reason is not None:
            return f"it waits for {parent.label}, which cannot work here: {parent.reason}", None, []
    starts = {parameter: parent.at_start for parameter, parent in parents.items()}
    known = {parameter: start for parameter, start in starts.items() if start is not None}
    if len(known) < len(starts):
        return None, None, notes
    try:
        sized = method.inherit(backbone, known)
        reason = unfit(sized, backbone)
    except InputError as error:
        raise InputError(f"{label}: {error}", error.mention or next(iter(method.parents.values()))) from None
    if reason is not None:  # which sizes that shrink may undo: the run itself has the last word
        return None, None, [*notes, f"at the sizes that this one starts with: {reason}"]
    return None, sized, [f"{notes[0]}; counted at the sizes that this one starts with"]
