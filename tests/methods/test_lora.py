"""LoRA: ranks by layer, scaling, inits, DoRA, and the controls that take ranks from elsewhere."""

import math
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from harness import registry
from harness.cli import main
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.contracts.subject import task_of
from harness.errors import InputError
from harness.method import Backbone
from harness.parameters import Finished, ParameterCount
from harness.record.store import RecordStore
from harness.run import checkpoint
from tests.support.refusals import assert_refused

LAYERS = 12  # of the synthetic task's BERT
PATTERN = 'rank_pattern={"query"=3,"value"=0,"bert.encoder.layer.1.output.dense"=2}'
VARIANTS = [
    f"lora[rank=4,{PATTERN},learning_rate=3e-3]",
    "lora[rank=4,rslora=true,init=gaussian]",
    "lora[rank=4,dora=true,dropout=0.1]",
    "lora[rank=4,init=orthogonal]",
    "lora[rank=4,init=olora]",
    "lora[rank=4,init=pissa]",
    "lora[rank=4,init=pissa_niter_3]",
]
CHANGING = ["olora", "pissa", "pissa_niter_3"]


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_the_contracts(variant, contract, tmp_path):
    contract(Subject(variant, tmp_path))


def logits(started, module=None):
    batch = started.task.collate(started.training.encoded, range(8), None)
    with torch.no_grad():
        return (module or started.adaptation.model).eval()(**batch.inputs).logits


def exported(started, folder):
    """The backbone as it was, with the trained adapter that PEFT loads by itself."""
    started.adaptation.export(folder)
    return PeftModel.from_pretrained(started.before.module, str(folder))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_is_the_trained_model_on_the_backbone_as_it_was(variant, tmp_path):
    started = start(Subject(variant, tmp_path))
    started.training.run(lambda training: None)
    torch.testing.assert_close(logits(started, exported(started, tmp_path / "x")), logits(started), rtol=0, atol=2e-6)


def scalings(started):
    return {name: layer.scaling["default"] for name, layer in started.adaptation.layers.items()}


def test_ranks_by_layer(tmp_path):
    started = start(Subject(f"lora[rank=4,{PATTERN}]", tmp_path))
    ranks = started.adaptation.ranks()
    assert list(ranks) == list(started.before.layers)
    for layer, rank in ranks.items():
        wanted = {"query": 3, "value": 0}.get(layer.rsplit(".", 1)[-1], 4)
        assert rank == (2 if layer == "bert.encoder.layer.1.output.dense" else wanted), layer
    count = started.training.sizes.parameters()
    assert count.adapter_final == sum(rank * sum(started.before.shape(layer)) for layer, rank in ranks.items())


def test_a_full_name_goes_before_an_end():
    backbone = Backbone(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), (), ("0", "1.0"))
    method = registry.make_method("lora", {"rank_pattern": {"1.0": 3, "0": 2}})
    assert method.layer_ranks(backbone) == {"0": 2, "1.0": 3}


@pytest.mark.parametrize(("options", "scale"), [("", 16 / 4), (",rslora=true", 16 / 2), (",alpha=1", 1 / 4)])
def test_every_layer_has_the_scale_of_the_rank_parameter(options, scale, tmp_path):
    for pattern in ("", f",{PATTERN}"):
        found = scalings(start(Subject(f"lora[rank=4{options}{pattern}]", tmp_path)))
        assert found == pytest.approx(dict.fromkeys(found, scale))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}])
def test_the_model_is_that_of_peft(options, tmp_path):
    ours, other = (start(Subject("head", tmp_path)).before for _ in range(2))
    names = {"use_rslora": "rslora", "use_dora": "dora", "init_lora_weights": "init"}
    method = registry.make_method("lora", {"rank": 3, "alpha": 6.0} | {names[k]: v for k, v in options.items()})
    torch.manual_seed(0)
    theirs = get_peft_model(
        other.module,
        LoraConfig(r=3, lora_alpha=6, target_modules=list(ours.layers), modules_to_save=list(ours.head), **options),
    )
    torch.manual_seed(0)
    model = method.start(ours, None, None, torch.Generator()).model
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    found = model.get_submodule(layer).scaling["default"]
    assert found == pytest.approx(theirs.get_submodule(layer).scaling["default"])


@pytest.mark.parametrize("init", CHANGING)
def test_changed_frozen_weights_come_back_with_a_checkpoint(init, tmp_path):
    """Also where the init, made again, would give something else."""
    name = f"lora[rank=4,init={init}]"
    whole = start(Subject(name, tmp_path))
    whole.training.update()
    checkpoint.save(tmp_path / "c", 1, whole.training.state_dict())
    resumed = start(Subject(name, tmp_path), seed=1)
    resumed.training.load_state_dict(checkpoint.load_newest(tmp_path / "c").state)
    for name, layer in whole.adaptation.layers.items():
        other = resumed.adaptation.layers[name]
        assert torch.equal(layer.get_base_layer().weight, other.get_base_layer().weight)
        pairs = (*whole.adaptation.taken[name], *resumed.adaptation.taken[name])
        assert torch.equal(pairs[0], pairs[2])
        assert torch.equal(pairs[1], pairs[3])


@pytest.mark.parametrize("init", CHANGING)
def test_what_an_init_took_from_the_backbone_is_counted_as_stored(init, tmp_path):
    plain = start(Subject("lora[rank=4]", tmp_path)).training.sizes.parameters()
    count = start(Subject(f"lora[rank=4,init={init}]", tmp_path)).training.sizes.parameters()
    assert count.adapter_final == plain.adapter_final
    assert count.stored_bytes == plain.stored_bytes + 4 * plain.adapter_final


def test_shuffled_ranks_are_the_same_ranks_among_layers_of_one_shape(tmp_path):
    shapes = start(Subject("lora", tmp_path)).before
    names = [layer for layer in shapes.layers if shapes.shape(layer) == (16, 16)]
    pattern = ",".join(f'"{name}"={rank}' for rank, name in enumerate(names))
    seen = []
    for seed in (0, 0, 1):
        name = f"lora[rank=4,rank_pattern={{{pattern}}},shuffle_ranks=true]"
        ranks = start(Subject(name, tmp_path), seed=seed).adaptation.ranks()
        assert sorted(ranks[name] for name in names) == list(range(len(names)))
        assert all(rank == 4 for name, rank in ranks.items() if name not in names)
        seen.append(ranks)
    assert seen[0] == seen[1] != seen[2]
    assert seen[0] != {name: seen[0][name] for name in shapes.layers} | {name: i for i, name in enumerate(names)}


EACH = 2 * (4 * 32 + 2 * 48)  # numbers of one rank everywhere on the synthetic task


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("parameters", "rank"), [(1, 1), (2.5 * EACH - 1, 2), (2.5 * EACH, 2), (2.5 * EACH + 1, 3), (10**9, 16)]
)
def test_the_uniform_rank_nearest_to_a_number_of_parameters(parameters, rank, dora):
    backbone = task_of("synthetic").backbone(None, meta=True)
    wanted = int(parameters) + (dora and 2 * (5 * 16 + 32))  # a magnitude for every output
    method = registry.make_method("lora", {"parameters": wanted, "dora": dora}).resolve(backbone, no_run)
    assert (method.rank, method.parameters) == (rank, None)


def no_run(run_id):
    raise AssertionError(f"asked for run {run_id}")


class BadSettings:
    """Bad values, and the one line that each gives."""

    ALONE = [
        ("init=pisa", "lora.init: unknown init 'pisa'. Did you mean 'pissa'?"),
        ("init=pissa,dora=true", "dora = true cannot be combined with init = pissa"),
        ("parameters=0", "lora.parameters = 0 is not allowed: it should be greater than or equal to 1"),
        ("parameters=900,rank=4", "parameters = 900 sets the rank, and so does rank"),
        ('parameters=900,ranks="a"', "parameters = 900 sets the rank, and so does ranks"),
        ('parameters=900,rank_pattern={"query"=1}', "parameters = 900 sets the rank, and so does rank_pattern"),
        ("shuffle_ranks=true", "shuffle_ranks = true has nothing to shuffle: give ranks_of, ranks or rank_pattern"),
        ('rank_pattern={"query"=-1}', "lora.rank_pattern.query = -1 is not allowed"),
        ('rank_pattern={"query"=true}', "lora.rank_pattern.query = True is not allowed"),
    ]
    ON_A_BACKBONE = [
        ('rank_pattern={"qurey"=1}', "unknown target module 'qurey'. Did you mean 'query'?"),
        ('rank_pattern={"query"=17}', "rank = 17 is above the smaller side of layer"),
        ('rank_pattern={"query"=1},target_modules=["value"]', "rank_pattern names 'query', which target_modules"),
        ("rank=3,init=orthogonal", "init = orthogonal takes even ranks; rank = 3"),
        ('ranks="0123456789abcdef"', "unknown run in "),
    ]


@pytest.mark.parametrize(("settings", "message"), BadSettings.ALONE + BadSettings.ON_A_BACKBONE)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"lora[{settings}]", message, tmp_path, capsys)


def convolution(**settings):
    return Backbone(nn.Sequential(nn.Conv2d(4, 4, 3, **settings)), (), ("0",))


@pytest.mark.parametrize(
    ("settings", "options", "reason"),
    [
        ({}, {"init": "pissa"}, "init = pissa is for linear layers, and layer '0' is a convolution"),
        ({"groups": 2}, {}, "groups"),
        ({"dilation": 2}, {}, "dilation"),
        ({"padding_mode": "circular", "padding": 1}, {}, "padding"),
        ({}, {"rank_pattern": {"0": 0}}, "every layer has rank 0"),
    ],
)
def test_what_does_not_fit_a_backbone_is_a_reason(settings, options, reason):
    assert reason in registry.make_method("lora", {"rank": 2} | options).unsupported(convolution(**settings))


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True, "init": "gaussian"}])
def test_convolutions(options):
    method = registry.make_method("lora", {"rank": 2} | options)
    backbone = convolution(padding=1)
    assert method.unsupported(backbone) is None
    x = torch.randn(2, 4, 5, 5)
    before = backbone.module(x)
    adaptation = method.start(backbone, None, None, torch.Generator())
    torch.testing.assert_close(adaptation.model(x), before)
    assert adaptation.adapter_parameters() == 2 * (4 + 36) + (4 if method.dora else 0)


# The controls, from the command line.


def run(folder, methods, *options):
    """Records of a comparison on the synthetic task."""
    arguments = ["run", "--tasks", "synthetic", "--batches", "6", "--results", str(folder), "--methods", methods]
    assert main([*arguments, "--executor", "serial", *options]) == 0
    return {record.run_id: record for record in RecordStore(folder).records()}


def only_new(before, after):
    (record,) = [record for run_id, record in after.items() if run_id not in before]
    return record


ENDED = Finished(
    {"0": 3, "2": 0},
    ParameterCount(adapter_initial=40, adapter_peak=40, adapter_final=33, head=0, total=99, stored_bytes=4),
)


def two_layers():
    return Backbone(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)), (), ("0", "2"))


def test_a_method_inherits_ranks_from_a_run_that_it_waited_for():
    method = registry.make_method("lora", {"ranks_of": "debora", "rank": 4})
    assert method.parents == {"ranks_of": "debora"}
    inherited = method.inherit(two_layers(), {"ranks_of": ENDED})
    assert inherited.layer_ranks(two_layers()) == {"0": 3, "2": 0}
    assert inherited.scale == method.scale
    with pytest.raises(InputError, match=r"call Method\.resolve and Method\.inherit first"):
        method.layer_ranks(two_layers())


def test_a_method_inherits_the_nearest_rank_to_a_runs_parameters():
    method = registry.make_method("lora", {"parameters_of": "debora"})
    assert method.inherit(two_layers(), {"parameters_of": ENDED}).layer_ranks(two_layers()) == {"0": 2, "2": 2}


def test_a_method_without_parents_inherits_nothing():
    method = registry.make_method("lora", {"rank": 2})
    assert method.parents == {}
    assert method.inherit(two_layers(), {}) == method


@pytest.mark.parametrize(
    ("parameter", "message"), [("ranks_of", "has no ranks: name"), ("parameters_of", "has no adapter: name")]
)
def test_a_run_without_what_a_method_takes(parameter, message):
    method = registry.make_method("lora", {parameter: "head"})
    nothing = ENDED.parameters.model_copy(update={"adapter_final": 0})
    with pytest.raises(InputError, match=message):
        method.inherit(two_layers(), {parameter: Finished({}, nothing)})


def test_retraining_at_the_ranks_of_a_run(tmp_path, capsys):
    source = run(tmp_path, f"lora[rank=4,{PATTERN}]")
    (run_id,) = source
    control = f"lora[rank=4,ranks={run_id}]"
    retrained = only_new(source, run(tmp_path, control))
    assert retrained.ranks == source[run_id].ranks
    assert retrained.spec.method_parameters["rank_pattern"] == source[run_id].ranks
    assert retrained.spec.method_parameters["ranks"] == run_id
    capsys.readouterr()
    run(tmp_path, control)
    assert "1 runs: 1 finished before, 0 to do" in capsys.readouterr().out
    label = (tmp_path / "tables" / "leaderboard.md").read_text()
    assert f"ranks={run_id}" in label.replace(" ", "").replace("\\", "")
    assert "{12 entries}" in label.replace("\\", "")
    # The record alone is enough to make it again, at another place.
    elsewhere = RecordStore(tmp_path / "elsewhere")
    elsewhere.make_ready()
    from harness.run.run import run_one

    assert run_one(retrained.spec, elsewhere).result() == retrained.result()


def test_shuffled_control_differs_by_seed_and_keeps_the_ranks(tmp_path):
    source = run(tmp_path, f"lora[rank=4,{PATTERN}]")
    (run_id,) = source
    after = run(tmp_path, f"lora[rank=4,ranks={run_id},shuffle_ranks=true]", "--seeds", "2")
    first, second = [record for record in after.values() if record.run_id != run_id]
    assert first.spec.method_parameters == second.spec.method_parameters
    assert first.ranks != second.ranks
    assert sorted(first.ranks.values()) == sorted(second.ranks.values()) == sorted(source[run_id].ranks.values())


def test_a_control_at_given_parameters_is_the_run_at_its_rank(tmp_path, capsys):
    first = run(tmp_path, "lora[rank=3]")
    (record,) = first.values()
    capsys.readouterr()
    after = run(tmp_path, f"lora[parameters={record.parameters.adapter_final + 5}],lora[rank=3]")
    assert after.keys() == first.keys()
    assert "1 runs: 1 finished before, 0 to do" in capsys.readouterr().out


def test_wrong_sources_of_ranks_are_one_line(tmp_path, capsys):
    records = run(tmp_path, "lora[rank=2],head")
    with_ranks = next(record for record in records.values() if record.ranks)
    without = next(record for record in records.values() if not record.ranks)
    near = with_ranks.run_id[:-1] + ("0" if with_ranks.run_id[-1] != "0" else "1")
    digits = ["--tasks", "digits"]
    for source, options, message in (
        (near, [], rf"unknown run in .* '{near}'\. Did you mean '{with_ranks.run_id}'\?"),
        ("../runs", [], r"unknown run in .* '\.\./runs'"),
        (without.run_id, [], f"run '{without.run_id}' ended with no ranks"),
        (with_ranks.run_id, digits, "12 of the 12 layers of run .* are not in this backbone, the first of them 'bert"),
    ):
        capsys.readouterr()
        methods = f'lora[ranks="{source}"]'
        assert main(["run", "--tasks", "synthetic", *options, "--methods", methods, "--results", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search(message, error), error
    assert RecordStore(tmp_path).read_all().records == list(records.values())


def test_ranks_and_a_pattern_contradict_each_other(tmp_path):
    method = registry.make_method("lora", {"ranks": "a", "rank_pattern": {"query": 1}})
    with pytest.raises(InputError, match="ranks and rank_pattern are both set"):
        method.resolve(task_of("synthetic").backbone(None, meta=True), no_run)


def test_the_dry_run_says_which_ranks(tmp_path, capsys):
    run(tmp_path, f"lora[rank=4,{PATTERN}]", "--dry-run")
    output = capsys.readouterr().out
    assert f"lora[rank=4,{PATTERN}] on synthetic: {4 * 8 - 2 + 2 * 3} components in 10 of 12 layers" in output
    assert f"each scaled by {16 / 4:g}; PEFT's rank_pattern would divide alpha by each layer's own rank" in output


def test_an_unresolved_method_does_not_start():
    backbone = task_of("synthetic").backbone(None, meta=True)
    for parameters in ({"parameters": 100}, {"ranks": "a"}, {"ranks_of": "a"}, {"parameters_of": "a"}):
        with pytest.raises(InputError, match="filled in when a run is planned"):
            registry.make_method("lora", parameters).start(backbone, None, None, torch.Generator())


def test_rslora_scale():
    assert registry.make_method("lora", {"rank": 5, "rslora": True}).scale == 16 / math.sqrt(5)
