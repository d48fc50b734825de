"""Seconds a generated token: as many tokens from both models, a median, and nothing of the run but its clock moves."""

import pytest
import torch

import harness.run.generation
from harness import registry
from harness.contracts import Subject, spec_of
from harness.notation import parse_choice
from harness.record.store import RecordStore
from harness.report.board.frame import to_frame
from harness.run.run import run_one
from harness.spec import Place
from tasks.answers import AnswerTask
from tasks.causal import tokenizer_of
from tests.support import tiny
from tests.support.report_records import board


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.write_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> str:
    path = tiny.write_pairs(tmp_path_factory.mktemp("data"))
    return f"generation:{path}[max_length=32,max_response=5]"


@pytest.fixture
def store(tmp_path):
    store = RecordStore(tmp_path / "results")
    store.make_ready()
    return store


def spec(tmp_path, model, task, method="lora[rank=2,learning_rate=1e-2]", **changes):
    return spec_of(Subject(method, tmp_path, task, batches=3, place=Place(model=model))).model_copy(update=changes)


class Clock:
    """One that moves by what a test says alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def is_bare(model) -> bool:
    return not any("lora_" in name for name, _ in model.named_parameters())


def test_both_are_timed_on_as_many_tokens_and_the_median_counts(store, tmp_path, model, task, monkeypatch):
    clock, asked = Clock(), []
    jumps = iter([50.0, 1.0, 2.0, 90.0] * 2)  # the first is not counted, and the largest is not the median

    def generate(self, model, batch, tokens):
        asked.append((is_bare(model), model.training, torch.is_grad_enabled(), len(batch.inputs["prompt_ids"]), tokens))
        clock.now += next(jumps) * (1 if is_bare(model) else 3)

    monkeypatch.setattr(harness.run.generation, "time", clock)
    monkeypatch.setattr(AnswerTask, "generate", generate)
    record = run_one(spec(tmp_path, model, task), store)
    assert record.status == "done", record.error
    rows = asked[0][3]
    assert rows == record.rows["validation"] == 12 < 2 * record.spec.train.batch_size
    assert asked == [(True, False, False, rows, 5)] * 4 + [(False, False, False, rows, 5)] * 4
    found = record.generation
    assert (found.rows, found.tokens) == (rows, 5)
    assert found.untouched == pytest.approx(2.0 / (5 * rows))
    assert found.trained == pytest.approx(3 * found.untouched)
    (row,) = board(record).rows
    columns = {column.name: column.text_of(row) for column in board(record).table if column.shown([row])}
    assert columns["ms_a_generated_token"] == f"{1e3 * found.trained:.3g}"
    assert columns["generation_to_backbone"] == "3.00"
    frame = to_frame([record])
    assert frame["generation_to_backbone"].tolist() == pytest.approx([3.0])


def test_an_answer_that_ends_at_once_is_no_cheaper(model, task):
    made = registry.make_task(*parse_choice(task))
    rows, _ = made.load(None)
    backbone = made.backbone(model).module.eval()
    batch = made.collate(made.encode(rows, model), [0, 1, 2], None)
    passes = []
    ends = made._end(tokenizer_of(backbone))

    def answer_end(module, args, output):
        passes.append(1)
        output.logits[..., ends] = 1e4
        return output

    backbone.register_forward_hook(answer_end)
    with torch.no_grad():
        made.generate(backbone, batch, 7)
    assert len(passes) == 7


def test_it_changes_nothing_else_of_a_run(store, tmp_path, model, task, monkeypatch):
    with_times = run_one(spec(tmp_path, model, task), store)
    assert with_times.generation.trained > 0
    monkeypatch.setattr(AnswerTask, "longest_answer", 0)
    other = RecordStore(tmp_path / "other")
    other.make_ready()
    without = run_one(spec(tmp_path, model, task), other)
    assert without.generation is None
    assert without.metrics == with_times.metrics
    assert [row["loss"] for row in other.history(without.run_id)] == [
        row["loss"] for row in store.history(with_times.run_id)
    ]


def test_nothing_is_timed_where_nothing_is_generated(store, tmp_path):
    assert run_one(spec_of(Subject("head", tmp_path, "synthetic", batches=2)), store).generation is None
