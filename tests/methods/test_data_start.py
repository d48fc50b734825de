"""A start from the data keeps the contracts, be it from gradients of weights or from inputs of layers."""

import pytest
import torch

from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.contracts.subject import method_of, spec_of
from harness.record.store import RecordStore
from harness.run.run import run_one
from harness.run.streams import TrainingData
from tests.support import data_start

SOURCES = ("gradients", "inputs")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    data_start.register(monkeypatch)


def named(source: str) -> str:
    return f"{data_start.NAME}[source={source}]"


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("source", SOURCES)
def test_contracts(source, contract, tmp_path):
    contract(Subject(named(source), tmp_path, batches=12))


@pytest.mark.parametrize("source", SOURCES)
def test_ranks_and_directions_come_from_the_data(source, tmp_path):
    run = start(Subject(named(source), tmp_path))
    before = run.adaptation.ranks()
    run.training.prepare()
    ranks = run.adaptation.ranks()
    assert sum(ranks.values()) == sum(before.values())
    assert len(set(ranks.values())) > 1
    assert run.training.used == run.training.data.drawn["upper"] == 3
    assert all(update.A.norm() > 0 for update in run.adaptation.updates.values())


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_stopped_while_it_prepares_begins_anew(source, tmp_path, monkeypatch):
    """No checkpoint is made before the first update."""
    spec = spec_of(Subject(named(source), tmp_path, batches=8))
    spec = spec.model_copy(update={"place": spec.place.model_copy(update={"checkpoint_every": 1})})
    whole, stopped = (RecordStore(tmp_path / name) for name in ("whole", "stopped"))
    for store in (whole, stopped):
        store.make_ready()
    prepare = data_start.DataStartAdaptation.prepare

    def stop(adaptation, step):
        prepare(adaptation, step)
        torch.rand(3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(data_start.DataStartAdaptation, "prepare", stop)
        with pytest.raises(KeyboardInterrupt):
            run_one(spec, stopped)
    assert not (stopped.checkpoints / spec.run_id).exists()
    expected, found = run_one(spec, whole), run_one(spec, stopped)
    assert found.status == "done", found.traceback
    assert found.result() == expected.result()
    assert stopped.history(spec.run_id) == whole.history(spec.run_id)


def test_the_streams_are_of_the_share_that_the_method_states(tmp_path, monkeypatch):
    made = []

    class Seen(TrainingData):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("harness.run.run.TrainingData", Seen)
    subject = Subject(f"{data_start.NAME}[share=0.2]", tmp_path, batches=5)
    store = RecordStore(tmp_path)
    store.make_ready()
    assert run_one(spec_of(subject), store).status == "done"
    for data in (*made, start(subject).training.data):
        upper, lower = ({row for _ in range(200) for row in data.draw(stream)} for stream in ("upper", "lower"))
        assert len(upper) == round(0.2 * data.size)
        assert upper | lower == set(range(data.size))
        assert not upper & lower
    assert len(made) == 1
    assert method_of("head").upper_share == 0.5
