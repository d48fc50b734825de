"""What the method interface offers, each by a small method that uses it and keeps the contracts."""

import json

import pytest
import torch

from harness.contracts import METHOD_CONTRACTS, Subject, spec_of, start
from harness.contracts.methods import every_size_is_counted, what_one_batch_sees_is_undone
from harness.method import Adaptation, Backbone
from harness.optimizer import adamw, parameter_groups
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.run import checkpoint
from harness.run.run import run_one
from harness.run.training import Training
from harness.spec import TrainSpec
from tests.support.toy_methods import registered_toys

ONE_RANK = 448  # parameters of one rank in each of the 12 layers of the synthetic task's backbone
KEEPING = ("growing", "scaled[dropout=0.1]", "with_ratio", "rewarmed", "masked")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    registered_toys(monkeypatch)


def trained(name, tmp_path, **train):
    """A method after a run of 24 batches, or with other settings of training."""
    started = start(Subject(name, tmp_path))
    old = started.training
    spec = TrainSpec(**{"batches": 24, "batch_size": 8, "warmup": 0.0, "schedule": "constant"} | train)
    budget = spec.budget(old.data.size)
    started.training = Training(old.adaptation, old.task, old.encoded, old.data, spec, old.device, budget)
    started.training.run(lambda training: None)
    return started


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("method", KEEPING)
def test_contracts(method, contract, tmp_path):
    contract(Subject(method, tmp_path))


class TestSizes:
    def test_a_method_that_grows_and_then_prunes_has_its_true_peak(self, tmp_path):
        started = trained("growing[every=2,rank=3,keep=0.25]", tmp_path)
        sizes = started.training.sizes
        assert [tuple(size) for size in sizes.trajectory[:4]] == [
            (0, 0, 0),
            (1, ONE_RANK, 12),
            (3, 2 * ONE_RANK, 24),
            (5, 3 * ONE_RANK, 36),
        ]
        ((batches, final, rank),) = sizes.trajectory[4:]
        assert (batches, rank) == (15, 9)
        count = sizes.parameters()
        assert (count.adapter_initial, count.adapter_peak, count.adapter_final) == (0, 3 * ONE_RANK, final)
        shapes = [(sum(started.before.shape(name)), r) for name, r in started.adaptation.ranks().items()]
        assert final == sum(size * r for size, r in shapes)
        assert count.total == sum(p.numel() for p in started.before.module.parameters()) + final

    def test_the_record_has_the_trajectory(self, tmp_path):
        store = RecordStore(tmp_path)
        store.make_ready()
        told = []
        record = run_one(spec_of(Subject("growing[rank=2]", tmp_path)), store, told.append)
        assert store.read(record.run_id) == record
        sizes = [size.adapter_parameters for size in record.trajectory]
        assert sizes[:3] == [0, ONE_RANK, 2 * ONE_RANK]
        assert max(sizes) == record.parameters.adapter_peak
        assert sizes[-1] == record.parameters.adapter_final
        assert record.trajectory[-1].rank == sum(record.ranks.values())
        assert told[0].adapter_parameters == 2 * ONE_RANK
        assert "adapter parameters" in told[0].text()

    def test_a_record_from_before_there_were_trajectories_is_read(self, tmp_path):
        store = RecordStore(tmp_path)
        store.make_ready()
        record = run_one(spec_of(Subject("head", tmp_path, batches=2)), store)
        assert [tuple(size) for size in record.trajectory] == [(0, 0, None)]
        content = json.loads(record.model_dump_json(exclude={"trajectory"})) | {"schema_version": 1}
        assert RunRecord.parse(json.dumps(content)).trajectory == ()

    def test_a_mask_is_counted_where_the_method_says_so(self, tmp_path):
        started = trained("masked[rank=4]", tmp_path)
        whole = 4 * ONE_RANK
        assert [tuple(size) for size in started.training.sizes.trajectory] == [
            (0, whole // 2, 24),
            (4, whole, 48),
            (7, whole // 4, 12),
        ]

    def test_a_mask_that_grows_in_silence_breaks_a_contract(self, tmp_path):
        with pytest.raises(AssertionError, match=f"{4 * ONE_RANK} parameters were counted as {2 * ONE_RANK}"):
            every_size_is_counted(Subject("silent[rank=4]", tmp_path))

    def test_the_constructor_asks_nothing_of_a_subclass(self):
        def refuse(*arguments):
            raise AssertionError("called before the method's own constructor has ended")

        hooks = {name: refuse for name, value in vars(Adaptation).items() if callable(value) and name[0] != "_"}
        model = torch.nn.Linear(2, 2)
        optimizer = adamw(model, 1e-3, 0.0)
        adaptation = type("Trap", (Adaptation,), hooks)(model, optimizer, Backbone(model, (), ()))
        assert adaptation.model is model

    def test_a_checkpoint_of_another_size_is_refused(self, tmp_path):
        state = start(Subject("lora[rank=1]", tmp_path)).adaptation.state_dict()
        with pytest.raises(ValueError, match="and was saved as"):
            start(Subject("lora[rank=2]", tmp_path)).adaptation.load_state_dict(state)


class TestForBatch:
    def test_one_scale_a_batch_whatever_its_pieces(self, tmp_path):
        training = start(Subject("scaled[alpha=8.0,rank=8]", tmp_path), batches=6).training
        spec = training.train.model_copy(update={"micro_batches": 4})
        adaptation, seen = training.adaptation, []
        layer = next(iter(adaptation.layers.values()))
        layer.register_forward_hook(lambda layer, args, output: seen.append(layer.scaling["default"]))
        parts = (adaptation, training.task, training.encoded, training.data)
        Training(*parts, spec, training.device, 6).run(lambda training: None)
        assert len(set(adaptation.drawn)) == 6
        assert seen == [scale for scale in adaptation.drawn for _ in range(4)]

    def test_what_is_drawn_moves_nothing_else(self, tmp_path):
        """With dropout, whose random numbers come from torch's own generator."""
        plain, scaled = (trained(name, tmp_path) for name in ("lora[dropout=0.2]", "scaled[dropout=0.2,spread=0.0]"))
        assert scaled.training.history == plain.training.history

    def test_the_scale_changes_the_training(self, tmp_path):
        plain, scaled = (trained(name, tmp_path) for name in ("lora", "scaled"))
        assert scaled.training.history != plain.training.history

    def test_evaluations_see_the_method_as_it_is(self, tmp_path):
        """Holdout and evaluation run between updates: there the scale is the method's own."""
        started, seen = start(Subject("scaled", tmp_path)), set()
        layers = started.adaptation.layers.values()
        started.training.run(lambda training: seen.update(layer.scaling["default"] for layer in layers))
        assert seen == {2.0}

    def test_a_scale_that_stays_breaks_a_contract(self, tmp_path):
        with pytest.raises(AssertionError, match="what the batch saw is still there"):
            what_one_batch_sees_is_undone(Subject("leaking", tmp_path))


class TestRatios:
    def test_groups_keep_their_ratio_through_the_schedule(self, tmp_path):
        started = start(Subject("with_ratio[ratio=4.0,learning_rate=0.01]", tmp_path))
        old = started.training
        spec = TrainSpec(batches=12, batch_size=8, warmup=0.25)
        training = Training(old.adaptation, old.task, old.encoded, old.data, spec, old.device, 12)
        rates = []
        training.run(
            lambda training: rates.append([group["lr"] for group in training.adaptation.optimizer.param_groups])
        )
        factors = [row["learning_rate_factor"] for row in training.history]
        assert len(set(factors)) > 5
        names = {id(p): name for name, p in started.adaptation.model.named_parameters()}
        is_b = [
            {".lora_B." in names[id(p)] for p in group["params"]} for group in started.adaptation.optimizer.param_groups
        ]
        for found, factor in zip(rates, factors, strict=True):
            assert found == [pytest.approx((4 if held == {True} else 1) * 0.01 * factor) for held in is_b]
        assert {True} in is_b
        assert {True, False} not in is_b

    def test_a_ratio_of_one_is_a_lora(self, tmp_path):
        plain, same = (trained(name, tmp_path) for name in ("lora", "with_ratio[ratio=1.0]"))
        assert [row["loss"] for row in same.training.history] == [row["loss"] for row in plain.training.history]

    def test_vectors_are_not_decayed_at_any_ratio_and_each_parameter_is_in_one_group(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
        groups = parameter_groups(model, 0.1, 0.5, {"1.weight": 2.0, "1.": 5.0})
        found = {(p.dim(), group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}
        assert found == {(2, 0.5, 0.1), (1, 0.0, 0.1), (2, 0.5, 0.2), (1, 0.0, 0.5)}
        assert sum(len(group["params"]) for group in groups) == 4

    def test_a_part_that_fits_nothing_is_told(self):
        with pytest.raises(ValueError, match="no trainable parameter's name holds 'lora_C'"):
            adamw(torch.nn.Linear(2, 2), 1e-3, 0.0, {"lora_C": 2.0})


class TestRestartedWarmup:
    def test_the_rate_warms_up_again_and_the_decay_goes_on(self, tmp_path):
        plain, again = (
            [row["learning_rate_factor"] for row in trained(name, tmp_path, schedule="linear").training.history]
            for name in ("lora", "rewarmed[at=[9,15]]")
        )
        shares = {10: 0.0, 11: 0.25, 12: 0.5, 13: 0.75, 16: 0.0, 17: 0.25, 18: 0.5, 19: 0.75}
        assert again == [shares.get(update, 1.0) * factor for update, factor in enumerate(plain)]

    def test_the_whole_schedule_restarted_ends_it(self, tmp_path):
        training = start(Subject("lora", tmp_path)).training

        def both(training):
            if training.index == 4:
                training.restart_warmup(10)
            if training.index == 6:
                training.restart_schedule()

        training.run(both)
        factors = [row["learning_rate_factor"] for row in training.history]
        assert factors[4:8] == [0.0, 0.1, 1.0, 1.0]

    def test_no_batches_are_told(self, tmp_path):
        with pytest.raises(ValueError, match="at least 1 batch, not 0"):
            start(Subject("lora", tmp_path)).training.restart_warmup(0)

    def test_a_resumed_run_goes_on_warming_up(self, tmp_path):
        first = start(Subject("lora", tmp_path)).training
        first.restart_warmup(8)
        first.update()
        checkpoint.save(tmp_path, first.used, first.state_dict())
        second = start(Subject("lora", tmp_path)).training
        second.load_state_dict(checkpoint.load_newest(tmp_path).state)
        second.update()
        second.fetch()
        assert [row["learning_rate_factor"] for row in second.history] == [0.0, 0.125]
