"""What every method must keep to."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness.backbone import number_of
from harness.backbone_dtype import lower
from harness.contracts.exports import nothing_is_pickled
from harness.contracts.subject import Started, Subject, method_of, one_update, spec_of, start
from harness.errors import InputError
from harness.method import in_modules
from harness.plan.preflight import preview
from harness.record.store import RecordStore
from harness.run import checkpoint
from harness.run.run import run_one
from harness.spec import TrainSpec
from harness.splits import make_splits
from harness.trace import OF_THE_LOOP


def unchanged_output_at_the_start(subject: Subject) -> None:
    """Before the first update, the adapted model computes what the backbone computes (where the method says so)."""
    started = start(subject)
    if not started.method.identity_at_start:
        return
    started.training.prepare()
    batch = started.batch(range(8))
    with torch.no_grad():
        expected = started.before.module.eval()(**batch.inputs).logits
        found = started.adaptation.model.eval()(**batch.inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=subject.tolerance)


def only_the_intended_parameters_train(subject: Subject) -> None:
    """Frozen parameters stay bit-equal; the head trains; the optimizer holds what requires a gradient, once, in float32
    whatever the backbone is held in."""
    started = start(subject)
    started.training.prepare()
    model = started.adaptation.model
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    head = {name: p.detach().clone() for name, p in _head(started)}
    assert head, "no parameter of the head is trained"
    held = [id(p) for group in started.adaptation.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)), "the optimizer holds a parameter twice"
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    started.training.run(lambda training: None)
    after = dict(model.named_parameters())
    moved = [name for name, value in frozen.items() if not torch.equal(value, after[name])]
    assert not moved, f"frozen parameters moved: {moved}"
    assert any(not torch.equal(value, after[name]) for name, value in head.items()), "the head did not train"


def loss_falls_on_a_batch_that_can_be_memorised(subject: Subject) -> None:
    """Many updates on eight examples at least halve their loss."""
    started = start(subject, batches=150)
    rows = tuple(range(8))
    started.training.data.draw = lambda stream: rows  # type: ignore[method-assign]
    started.training.run(lambda training: None)
    losses = [row["loss"] for row in started.training.history]
    assert min(losses[-10:]) < 0.5 * losses[0], f"the loss went from {losses[0]:.3f} to {min(losses[-10:]):.3f}"


def counts_are_right(subject: Subject) -> None:
    """The counts agree with the backbone's size, and with those from the meta device."""
    started = start(subject)
    count = started.training.sizes.parameters()
    backbone = sum(map(number_of, started.before.module.parameters()))
    head = sum(p.numel() for _, p in started.before.head_parameters())
    assert count.head == head
    assert count.total in (backbone, backbone + count.adapter_final)
    assert count.adapter_initial == count.adapter_final == count.adapter_peak
    if count.total == backbone:  # it trains the backbone's own parameters, or none
        assert count.adapter_final <= backbone - head
    place = subject.place
    model = place.model or started.task.default_model
    rows = make_splits(started.task, place.data_root).train
    bare = started.task.backbone(model, meta=True)
    lower(bare, subject.backbone_dtype)
    assert preview(started.method, bare, TrainSpec(), len(rows)) == count
    started.training.run(lambda training: None)
    count = started.training.sizes.parameters()
    assert 0 <= count.adapter_final <= count.adapter_peak
    assert count.adapter_initial <= count.adapter_peak


def every_size_is_counted(subject: Subject) -> None:
    """The adapter is never larger than its peak, the trajectory's largest size; its first is the count at the start and
    its last the one at the end. (A method that masks says `Step.resized` where it grows.)"""
    started = start(subject)
    adaptation, sizes = started.adaptation, started.training.sizes
    seen = [adaptation.adapter_parameters()]
    started.training.run(lambda training: seen.append(adaptation.adapter_parameters()))
    count, entered = sizes.parameters(), [size.adapter_parameters for size in sizes.trajectory]
    assert count.adapter_peak == max(entered) >= max(seen), f"{max(seen)} parameters were counted as {max(entered)}"
    assert (count.adapter_initial, count.adapter_final) == (entered[0], entered[-1]) == (seen[0], seen[-1])
    ranks = adaptation.ranks()
    assert sizes.trajectory[-1].rank == (sum(ranks.values()) if ranks else None)
    assert all(one[1:] != other[1:] for one, other in itertools.pairwise(sizes.trajectory)), "no change was entered"
    batches = [size.batches for size in sizes.trajectory]
    assert batches == sorted(batches)
    assert batches[0] == 0
    assert batches[-1] <= subject.batches


def gradient_checkpointing_changes_no_loss(subject: Subject) -> None:
    """With it, where the model has it, every loss and every size is what it is without it, dropout included. (A method
    whose blocks do not depend on their inputs alone says so by `repeatable_blocks`.)"""
    runs: list[Started] = []
    if not method_of(subject.name).repeatable_blocks:
        return
    for again in (True, False):
        place = subject.place.model_copy(update={"gradient_checkpointing": again})
        try:
            runs.append(start(replace(subject, place=place)))
        except InputError:
            return
        runs[-1].training.run(lambda training: None)
    _assert_equal_runs(*runs)


def what_one_batch_sees_is_undone(subject: Subject) -> None:
    """After `for_batch`, where a method has it, the model is bit-equal to what it was, and so is what it computes."""
    started = start(subject)
    one_update(started.training)
    adaptation, before = started.adaptation, _model_state(started)
    around = adaptation.for_batch(started.training)
    if around is None:
        return
    inputs = started.batch(range(8)).inputs
    with torch.no_grad():
        expected = adaptation.model.eval()(**inputs).logits
        with around:
            adaptation.model(**inputs)
        assert torch.equal(adaptation.model(**inputs).logits, expected), "what the batch saw is still there"
    assert _same(before, _model_state(started))


def ranks_name_layers_of_the_backbone(subject: Subject) -> None:
    """Every rank belongs to a layer of the backbone and lies between 0 and its smaller side."""
    started = start(subject)
    started.training.run(lambda training: None)
    for layer, rank in started.adaptation.ranks().items():
        assert layer in started.before.layers
        assert 0 <= rank <= min(started.before.shape(layer))


def the_budget_is_used_exactly(subject: Subject) -> None:
    """Every batch that is drawn counts, and the run ends when the budget is used. A preparation leaves some of it, and
    no gradients. A method that says so draws from one stream alone."""
    started = start(subject)
    started.training.prepare()
    assert started.training.used < subject.batches
    assert all(p.grad is None for p in started.adaptation.model.parameters())
    started.training.run(lambda training: None)
    assert started.training.used == subject.batches >= sum(started.training.data.drawn.values())
    assert started.training.index <= started.training.used
    rule = started.method.data_rule
    assert 0 < started.method.upper_share < 1
    assert rule == "halves" or started.training.data.drawn["lower"] == started.training.data.drawn["upper"] == 0


def a_run_interrupted_after_every_update_equals_the_uninterrupted_one(subject: Subject) -> None:
    """Saved to disk after each update and resumed in a new adaptation, again and again, training ends bit-equal."""
    whole = start(subject)
    whole.training.run(lambda training: None)
    interrupted = start(subject)
    while interrupted.training.used < subject.batches:
        one_update(interrupted.training)
        checkpoint.save(subject.folder, interrupted.training.used, interrupted.training.state_dict())
        if interrupted.training.used < subject.batches:
            state = checkpoint.load_newest(subject.folder).state
            assert state is not None
            interrupted = start(subject)
            interrupted.training.load_state_dict(state)
    _assert_equal_runs(whole, interrupted)


def the_same_seed_gives_the_same_record(subject: Subject) -> None:
    """Two runs of one spec differ in nothing but times and places; the record on disk validates and says done."""
    records = []
    for name in ("first", "second"):
        store = RecordStore(subject.folder / name)
        store.make_ready()
        record = run_one(spec_of(subject), store)
        assert record.status == "done", record.traceback
        assert store.read(record.run_id) == record
        assert len(store.history(record.run_id)) == record.updates > 0
        records.append((record, store.history(record.run_id), _files(store.folder(record.run_id))))
    (first, first_history, first_files), (second, second_history, second_files) = records
    assert first.result() == second.result()
    assert first_history == second_history
    assert first_files == second_files


def another_seed_gives_another_run(subject: Subject) -> None:
    """The seed reaches the data order and the initial values."""
    first, second = start(subject, seed=0), start(subject, seed=1)
    for started in (first, second):
        started.training.run(lambda training: None)
    assert [row["loss"] for row in first.training.history] != [row["loss"] for row in second.training.history]


def the_history_holds_what_is_declared(subject: Subject) -> None:
    """Beside the loop's own values, rows have those of the method's `traces` alone: for a heat map a number for each
    layer of `ranks`, for other drawings a number."""
    started = start(subject)
    started.training.run(lambda training: None)
    traces, layers = {trace.name: trace for trace in started.method.traces}, len(started.adaptation.ranks())
    for row in started.training.history:
        undeclared = row.keys() - {*OF_THE_LOOP, *traces}
        assert not undeclared, f"no trace of the method declares {sorted(undeclared)}"
        for name in row.keys() & traces.keys():
            drawing = traces[name].drawing
            assert drawing is None or isinstance(row[name], list) == (drawing == "heat_map"), f"{name}: {row[name]!r}"
            assert drawing != "heat_map" or len(row[name]) == layers, f"{name} has {len(row[name])} of {layers} layers"


def a_cut_to_a_rank_has_it_and_is_undone(subject: Subject) -> None:
    """Within `at_rank`, where a method has it, no update has a higher rank, and at the live rank it is whole; after
    it the model is bit-equal to what it was."""
    started = start(subject)
    started.training.run(lambda training: None)
    for model in (started.before.module, started.adaptation.model):
        model.float()  # in the backbone's own precision, rounding of the output would hide the update's rank
    adaptation, before = started.adaptation, _model_state(started)
    ranks, whole = adaptation.ranks(), _updates(started)
    cut = adaptation.at_rank(1)
    if cut is None:
        return
    for rank in range(1, 1 + max(ranks.values())):
        with adaptation.at_rank(rank) or contextlib.nullcontext():
            found = _updates(started)
        assert _same(before, _model_state(started)), f"the cut to rank {rank} was not undone"
        for layer, update in found.items():
            singular = torch.linalg.svdvals(update)
            assert (singular[rank:] <= 1e-5 * max(1.0, float(singular[0]))).all(), f"'{layer}' is above rank {rank}"
            if rank >= ranks[layer]:
                torch.testing.assert_close(update, whole[layer], rtol=1e-4, atol=subject.tolerance)


METHOD_CONTRACTS = (
    unchanged_output_at_the_start,
    only_the_intended_parameters_train,
    loss_falls_on_a_batch_that_can_be_memorised,
    counts_are_right,
    every_size_is_counted,
    gradient_checkpointing_changes_no_loss,
    what_one_batch_sees_is_undone,
    ranks_name_layers_of_the_backbone,
    the_budget_is_used_exactly,
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    the_same_seed_gives_the_same_record,
    another_seed_gives_another_run,
    the_history_holds_what_is_declared,
    nothing_is_pickled,
    a_cut_to_a_rank_has_it_and_is_undone,
)


def _updates(started: Started) -> dict[str, torch.Tensor]:
    """What each adapted linear layer computes beside the backbone's own, as a matrix (inputs, outputs)."""
    found = {}
    model = started.adaptation.model.eval()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in started.adaptation.ranks():
            base = started.before.module.get_submodule(name)
            (layer,) = (module for full, module in modules.items() if f".{full}".endswith(f".{name}"))
            if not isinstance(base, torch.nn.Conv2d):
                unit = torch.eye(started.before.shape(name)[1], device=started.training.device)
                found[name] = (layer(unit) - base(unit)).double()
    return found


def _model_state(started: Started) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in started.adaptation.model.state_dict().items()}


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def _head(started: Started) -> list[tuple[str, Any]]:
    trained = [(name, p) for name, p in started.adaptation.model.named_parameters() if p.requires_grad]
    return [(name, p) for name, p in trained if in_modules(name, started.before.head)]


def _assert_equal_runs(one: Started, two: Started) -> None:
    assert one.training.history == two.training.history
    assert one.adaptation.ranks() == two.adaptation.ranks()
    assert one.training.sizes.parameters() == two.training.sizes.parameters()
    assert one.training.sizes.trajectory == two.training.sizes.trajectory
    for (name, value), (_, other) in zip(
        one.adaptation.model.state_dict().items(), two.adaptation.model.state_dict().items(), strict=True
    ):
        assert torch.equal(value, other), name


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "record.json"}
