"""The gateway: every tuner of the installed PEFT, its fields checked, its needs of the training loop met."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from harness import registry
from harness.cli import main
from harness.contracts import METHOD_CONTRACTS, Subject
from harness.contracts.subject import Started, method_of, start, task_of
from harness.errors import InputError
from harness.method import Backbone
from harness.plan.sweep import Sweep, method_cells
from harness.run import checkpoint
from harness.spec import Place
from methods.peft_tuners.adaptation import ADAPTER, PeftAdaptation
from methods.peft_tuners.method import TRIED, PeftMethod, tuner_types
from methods.shared import eva as shared_eva
from tests.support import tiny

SMALL = "synthetic[num_blocks=1,num_rows=64]"
EVA = "peft[type=lora,r=2,init_lora_weights=eva,eva_config={rho=2.0,tau=0.5}]"
PROMPTS = ("cartridge", "p_tuning", "prefix_tuning", "prompt_tuning")
NOT_IDENTITY = (*PROMPTS, "c3a", "fourierft")  # random from the start
WIDELY_USED = ("boft", "fourierft", "hra", "ia3", "ln_tuning", "loha", "lokr", "lora", "oft", "vera")
QUERY = "bert.encoder.layer.0.attention.self.query"
WORK = [name for name, tried in TRIED.items() if tried.failure is None]

# PEFT speaks of missing CUDA kernels, block sizes that it adjusts, token types that a prompt makes it drop.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A BERT with room for a prompt, and GLUE in its published layout."""
    return tiny.write_all(tmp_path_factory.mktemp("text"))


def named(kind: str) -> str:
    fields = f",{TRIED[kind].fields}" if TRIED[kind].fields else ""
    rate = ",learning_rate=1e-2" if kind in ("fourierft", "vera") else ""
    return f"peft[type={kind}{fields}{rate}]"


def subject_of(kind: str, folder: Path, text: Path) -> Subject:
    if kind in PROMPTS:
        place = Place(data_root=str(text / "data"), model=str(text / "bert"))
        return Subject(named(kind), folder, task="glue/sst2", batches=8, place=place)
    return Subject(named(kind), folder, task=SMALL, batches=8)


def started(name: str, batches: int = 24, task: str = "synthetic") -> tuple[Started, PeftAdaptation]:
    run = start(Subject(name, Path(), task=task, batches=batches))
    assert isinstance(run.adaptation, PeftAdaptation)
    return run, run.adaptation


@pytest.mark.parametrize("kind", tuner_types())
def test_the_table_of_what_was_tried_is_true(kind, tmp_path, text):
    if kind == "adalora":
        return
    if kind not in TRIED:
        pytest.fail(f"PEFT has a tuner that is not in the table: {kind}")
    subject = subject_of(kind, tmp_path, text)
    task = task_of(subject.task)
    reasons = []
    for meta in (True, False):
        try:
            reasons.append(method_of(subject.name).unsupported(task.backbone(subject.place.model, meta=meta)))
        except InputError as error:
            reasons.append(str(error))
    failure = TRIED[kind].failure
    if failure is not None:
        assert all(reason is not None and reason.endswith(failure) for reason in reasons), reasons
        return
    assert reasons == [None, None]
    run = start(subject, batches=2)
    inputs = run.task.collate(run.training.encoded, range(4), None).inputs
    with torch.no_grad():
        before, after = (m.eval()(**inputs).logits for m in (run.before.module, run.adaptation.model))
    assert kind in NOT_IDENTITY or (before - after).abs().max() < 1e-6
    parameters = {name: p.detach().clone() for name, p in run.adaptation.model.named_parameters()}
    run.training.run(lambda training: None)
    moved = {n for n, p in run.adaptation.model.named_parameters() if not torch.equal(p, parameters[n])}
    assert isinstance(run.adaptation, PeftAdaptation)
    assert moved & set(run.adaptation.adapter)
    assert 0 < run.training.sizes.parameters().adapter_final < 30_000


def contracts(kinds: tuple[str, ...]) -> list:
    """Every pair but two: a prompt does not steer an encoder with random weights, and one has a frozen token."""
    skipped = {(kind, "loss_falls_on_a_batch_that_can_be_memorised") for kind in PROMPTS} | {
        ("cartridge", "counts_are_right")
    }
    pairs = [(kind, contract) for kind in kinds for contract in METHOD_CONTRACTS]
    return [
        pytest.param(kind, contract, id=f"{kind}-{contract.__name__}")
        for kind, contract in pairs
        if (kind, contract.__name__) not in skipped
    ]


@pytest.mark.parametrize(("kind", "contract"), contracts((*WIDELY_USED, "adamss")))
def test_contracts_of_the_widely_used(kind, contract, tmp_path, text):
    contract(subject_of(kind, tmp_path, text))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "contract"), contracts(tuple(k for k in WORK if k not in (*WIDELY_USED, "adamss"))))
def test_contracts_of_the_others(kind, contract, tmp_path, text):
    contract(subject_of(kind, tmp_path, text))


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts_of_eva(contract, tmp_path):
    contract(Subject(EVA, tmp_path, batches=12))


def test_eva_starts_from_the_directions_of_the_inputs_and_counts_its_batches():
    run, adaptation = started(EVA)
    seen: list[torch.Tensor] = []
    layer = adaptation.model.get_submodule(f"base_model.model.{QUERY}")
    layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().flatten(0, -2)))
    run.training.update()
    batches = run.training.used
    assert batches == len(seen) == run.training.data.drawn["all"] > 2
    assert run.training.schedule_start == batches - 1
    ranks = adaptation.ranks()
    assert sum(ranks.values()) == 2 * len(run.before.layers)
    assert len(set(ranks.values())) > 1
    assert all(part.training for part in adaptation.model.modules())

    again, before_training = started(EVA)
    again.training.prepare()
    found = before_training.model.get_submodule(f"base_model.model.{QUERY}").lora_A[ADAPTER].weight
    rows = torch.cat(seen[1:-1])  # the first batch only tells which layers share their inputs, the last is the update's
    _, _, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    overlap = torch.linalg.svdvals(found @ directions[: len(found)].T)  # 1 where they span the same space
    assert overlap.min() > 0.9


def test_eva_leaves_padding_out(text, monkeypatch):
    place = Place(data_root=str(text / "data"), model=str(text / "bert"))
    run = start(Subject(EVA, Path(), task="glue/sst2", batches=40, place=place))
    import peft.tuners.lora.eva as module

    rows, real, fit = [], [], module.IncrementalPCA.partial_fit
    monkeypatch.setattr(module.IncrementalPCA, "partial_fit", lambda pca, X: (rows.append(len(X)), fit(pca, X)))
    model = run.adaptation.model
    model.register_forward_pre_hook(
        lambda module, args, inputs: real.append(int(inputs["attention_mask"].sum())), with_kwargs=True
    )
    run.training.prepare()
    assert set(rows) <= set(real)
    assert len(set(real)) > 1


def test_layers_that_eva_gives_no_rank(tmp_path, monkeypatch):
    """Their adapter goes, and the optimizer holds what is left; a resume builds the same."""
    run, adaptation = started(EVA)
    ranks = dict.fromkeys(adaptation.ranks(), 2) | {QUERY: 0}
    directions = {f"base_model.model.{n}": torch.eye(r, run.before.shape(n)[1]) for n, r in ranks.items()}
    monkeypatch.setattr(shared_eva, "get_eva_state_dict", lambda *arguments, **options: directions)
    run.training.prepare()
    assert QUERY not in adaptation.ranks()
    held = {id(p) for group in adaptation.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in adaptation.model.parameters() if p.requires_grad}
    run.training.update()
    resumed, other = started(EVA)
    checkpoint.save(tmp_path, 0, run.training.state_dict())
    state = checkpoint.load_newest(tmp_path).state
    assert state is not None
    resumed.training.load_state_dict(state)
    for training in (run.training, resumed.training):
        torch.manual_seed(1)  # dropout
        training.update()
    assert other.ranks() == adaptation.ranks()
    for one, two in zip(adaptation.model.state_dict().items(), other.model.state_dict().items(), strict=True):
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1])


def test_eva_that_does_not_converge_is_told():
    run, _ = started(EVA.replace("tau=0.5", "tau=1.0"), batches=5)
    with pytest.raises(RuntimeError, match="EVA's directions have not converged in 4 batches"):
        run.training.prepare()


def test_adamss_stops_training_subspaces_which_stay_in_effect():
    run, adaptation = started(named("adamss"), batches=8, task=SMALL)
    before = adaptation.adapter_parameters()
    run.training.run(lambda training: None)
    training = [row["training_numbers"] for row in run.training.history]
    assert training == sorted(training, reverse=True)
    assert training[0] == before > training[-1] > 0
    assert adaptation.adapter_parameters() == run.training.sizes.parameters().adapter_final == before
    parameters = dict(adaptation.model.named_parameters())
    stopped = [parameters[name] for name in adaptation.adapter if not parameters[name].requires_grad]
    assert sum(p.numel() for p in stopped) == before - training[-1]
    assert any(p.count_nonzero() > 0 for p in stopped)


@pytest.mark.parametrize("name", [EVA, "peft[type=ia3]", "peft[type=vera,r=8]", "peft[type=ln_tuning]"])
def test_an_export_gives_the_same_outputs(name, tmp_path):
    run, adaptation = started(name)
    run.training.run(lambda training: None)
    adaptation.export(tmp_path)
    inputs = run.task.collate(run.training.encoded, range(8), None).inputs
    loaded = PeftModel.from_pretrained(run.before.module, tmp_path).eval()
    with torch.no_grad():
        expected = adaptation.model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "peft.type is missing"),
        ({"type": "vra"}, "unknown PEFT type 'vra'. Did you mean 'vera'?"),
        ({"type": "vera", "d_intial": 3}, "unknown parameter of peft[type=vera] 'd_intial'. Did you mean 'd_initial'?"),
        ({"type": "vera", "learning_rat": 3}, "Did you mean 'learning_rate'?"),
        ({"type": "vera", "r": "many"}, "peft[type=vera].r = 'many' is not allowed: it should be a valid integer"),
        ({"type": "vera", "r": True}, "peft[type=vera].r = True is not allowed"),
        ({"type": "vera", "task_type": "SEQ_CLS"}, "unknown parameter of peft[type=vera] 'task_type'"),
        ({"type": "lora", "eva_config": {"roh": 1.0}}, "eva_config"),
        ({"type": "vera", "learning_rate": 0}, "peft.learning_rate = 0 is not allowed: it should be greater than 0"),
        ({"type": "adalora"}, "write --methods adalora"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(InputError) as error:
        registry.make_method("peft", parameters)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_are_checked_against_peft_for_every_tuner():
    for kind in tuner_types().keys() - {"adalora"}:
        with pytest.raises(InputError, match="unknown parameter of"):
            registry.make_method("peft", {"type": kind, "no_such_field": 1})
        assert registry.make_method("peft", {"type": kind}).model_dump(mode="json")["type"] == kind


def test_a_method_and_its_record_are_the_same():
    method = registry.make_method("peft", {"type": "LoRA", "r": 4, "lora_alpha": 8, "eva_config": {"rho": 1.0}})
    values = method.model_dump(mode="json")
    assert values == {
        "learning_rate": 1e-3, "weight_decay": 0.0, "type": "lora", "target_modules": None, "r": 4,
        "eva_config": {"rho": 1.0},
    }  # fmt: skip
    assert registry.make_method("peft", values) == method


def test_a_grid_over_a_tuner_s_own_field():
    sweep = Sweep.of({"methods": ["peft[type=vera]"], "grid": {"peft.r": [8, 16]}}, "sweep")
    assert [method.model_dump()["r"] for _, method in method_cells(sweep)] == [8, 16]


def test_a_backbone_that_does_not_fit_is_a_reason():
    module = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2))
    backbone = Backbone(module, head=("2",), layers=("0",))
    before = list(module.state_dict())
    for kind in ("vera", "adamss"):
        reason = registry.make_method("peft", {"type": kind}).unsupported(backbone)
        assert reason is not None
        assert reason.startswith(f"PEFT's {kind} cannot adapt this backbone: ")
        assert "\n" not in reason
    assert registry.make_method("peft", {"type": "lora", "r": 2}).unsupported(backbone) is None
    assert list(module.state_dict()) == before, "the backbone was changed"
    assert "no linear or convolution layer" in PeftMethod(type="vera").unsupported(
        Backbone(module, head=("2",), layers=())
    )


def test_a_cell_that_cannot_be_is_reported_and_the_sweep_goes_on(tmp_path, capsys):
    methods = "peft[type=poly],peft[type=ia3]"
    options = ["--methods", methods, "--tasks", SMALL, "--batches", "2", "--results", str(tmp_path)]
    assert main(["run", *options, "--executor", "serial"]) == 0
    assert "task_ids should not be None" in capsys.readouterr().out


def test_the_listing_says_what_was_tried(capsys):
    assert main(["list", "peft"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    said = {line[0]: line[1] for line in lines if len(line) == 2}
    assert said["ia3"] == "works"
    assert said["miss"] == "works with r=4"
    assert said["poly"] == "fails: task_ids should not be None."
    assert said["adalora"] == "is the method adalora"
