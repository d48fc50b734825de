"""The type that a frozen backbone is held in: what is held, what is counted, what trains, and what is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from harness import cli
from harness.backbone import number_of
from harness.backbone_dtype import held_bytes, lower, pack, unfit
from harness.contracts import Subject, spec_of
from harness.contracts.methods import (
    a_cut_to_a_rank_has_it_and_is_undone,
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    counts_are_right,
    only_the_intended_parameters_train,
    the_same_seed_gives_the_same_record,
    unchanged_output_at_the_start,
)
from harness.contracts.subject import method_of, start, task_of
from harness.method import Backbone, is_adaptable
from harness.record.store import RecordStore
from harness.run.run import run_one
from harness.spec import TrainSpec
from tests.support.contract_settings import PARAMETERS

CPU = torch.device("cpu")
QUANTISED = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install '.[quantised]'"
)
ON_PACKED = ["lora", "adalora", "debora", "head", "hadapter"]


def backbone_in(dtype: str, task: str = "synthetic") -> Backbone:
    torch.manual_seed(0)
    backbone = task_of(task).backbone(None)
    lower(backbone, dtype)
    pack(backbone, CPU)
    return backbone


def resnet(meta: bool = False) -> Backbone:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        module = ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        )
    layers = [name for name, layer in module.named_modules() if name.startswith("resnet") and is_adaptable(layer)]
    return Backbone(module, ("classifier",), tuple(layers))


def frozen_bytes(backbone: Backbone) -> int:
    return held_bytes(backbone.module) - sum(p.nbytes for _, p in backbone.head_parameters())


class TestWhatIsHeld:
    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_half_the_bytes_of_float32(self, dtype):
        whole, half = backbone_in("fp32"), backbone_in(dtype)
        assert frozen_bytes(half) * 2 == frozen_bytes(whole)
        assert {p.dtype for _, p in half.head_parameters()} == {torch.float32}

    def test_a_record_tells_the_bytes(self, tmp_path):
        spec = spec_of(Subject("head", tmp_path, batches=2))
        found = {}
        for dtype in ("fp32", "bf16"):
            store = RecordStore(tmp_path / dtype)
            store.make_ready()
            train = spec.train.model_copy(update={"backbone_dtype": dtype})
            found[dtype] = run_one(spec.model_copy(update={"train": train}), store)
        assert found["fp32"].backbone_bytes == held_bytes(backbone_in("fp32").module)
        assert found["bf16"].backbone_bytes == held_bytes(backbone_in("bf16").module)
        assert found["fp32"].parameters == found["bf16"].parameters

    def test_the_head_gets_float32_and_what_the_model_gets_is_cast(self):
        """`digits` has pixels in float32, which a linear layer in bfloat16 does not take."""
        backbone, seen = backbone_in("bf16", "digits"), {}
        for name in ("first", "classifier"):
            layer = backbone.module.get_submodule(name)
            layer.register_forward_hook(lambda layer, args, output, name=name: seen.update({name: args[0].dtype}))
        assert backbone.module(pixels=torch.rand(2, 64)).logits.dtype == torch.float32
        assert seen == {"first": torch.bfloat16, "classifier": torch.float32}

    @pytest.mark.parametrize("method", ["lora[rank=2]", "adalora[init_rank=2,target_rank=1]", "debora[rank=2,T_max=2]"])
    def test_convolutions(self, method):
        """BatchNorm keeps float32 with its statistics, kernels do not; what is adapted trains in float32."""
        backbone, pixels = resnet(), torch.rand(2, 3, 32, 32)
        expected = backbone.module.eval()(pixel_values=pixels).logits
        lower(backbone, "bf16")
        kernels = [backbone.module.get_parameter(f"{name}.weight") for name in backbone.layers]
        assert {kernel.dtype for kernel in kernels} == {torch.bfloat16}
        assert unfit(method_of(method), backbone) is None
        data = Drawn()
        adaptation = method_of(method).start(backbone, TrainSpec(batches=20), data, torch.Generator().manual_seed(0))
        found = adaptation.model.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
        adaptation.model.train()(pixel_values=pixels).logits.sum().backward()
        trained = [p for p in adaptation.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


class Drawn:
    """Training data that nobody draws."""

    size = 64


class TestIdentity:
    def test_float32_is_no_part_of_it(self, tmp_path):
        spec = spec_of(Subject("head", tmp_path))
        assert "backbone_dtype" not in json.loads(spec.model_dump_json())["train"]
        other = spec.model_copy(update={"train": spec.train.model_copy(update={"backbone_dtype": "bf16"})})
        assert other.run_id != spec.run_id
        assert other.setting_key != spec.setting_key


class TestWhatIsRefused:
    @pytest.mark.parametrize("method", ["full", "bitfit", "adamss"])
    def test_a_method_that_needs_float32_is_a_cell_with_a_reason(self, method, tmp_path, capsys):
        given = ["run", "--tasks", "synthetic", "--methods", f"{method},head", "--batches", "2", "--seeds", "1"]
        given += ["--executor", "serial", "--backbone-dtype", "bf16", "--results", str(tmp_path / "results")]
        assert cli.main(given) == 0
        records = list(RecordStore(tmp_path / "results").records())
        found = {record.spec.method: (record.status, record.error) for record in records}
        assert found[method] == ("unsupported", "it takes a backbone in fp32, not in bf16")
        assert found["head"][0] == "done"

    def test_a_word_that_is_no_type(self, tmp_path, capsys):
        given = ["run", "--tasks", "synthetic", "--methods", "head", "--backbone-dtype", "int4"]
        assert cli.main([*given, "--results", str(tmp_path / "results")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "--backbone-dtype = 'int4' is not allowed: it should be 'fp32', 'bf16', 'fp16', 'int8' or 'nf4'" in line
        assert not (tmp_path / "results").exists()

    def test_packed_without_the_library(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        given = ["run", "--tasks", "synthetic", "--methods", "head", "--backbone-dtype", "nf4"]
        assert cli.main([*given, "--results", str(tmp_path / "results")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "--backbone-dtype nf4 needs bitsandbytes" in line
        assert "pip install 'rank-adaptive-harness[quantised]'" in line
        assert not (tmp_path / "results").exists()

    @pytest.mark.parametrize("dtype", ["int8", "nf4"])
    @pytest.mark.parametrize(
        ("method", "reason"),
        [
            ("lora_ga[rank=4]", "it takes a backbone in fp32, bf16 or fp16, not in {}"),
            ("lora[rank=4,init=pissa]", "init = pissa reads the weights, which are packed as {}"),
            ("lora[rank=4,dora=true]", "dora = true reads the weights, which are packed as {}"),
            ("peft[type=oft]", "PEFT's oft was not tried on weights packed as {}"),
            ("peft[type=lora,use_dora=true]", "PEFT's lora with use_dora was not tried on weights packed as {}"),
        ],
    )
    def test_methods_that_read_the_weights(self, method, reason, dtype):
        backbone = task_of("synthetic").backbone(None, meta=True)
        lower(backbone, dtype)
        assert unfit(method_of(method), backbone) == reason.format(dtype)

    def test_a_backbone_with_nothing_to_pack(self):
        backbone = resnet(meta=True)
        lower(backbone, "nf4")
        reason = unfit(method_of("lora"), backbone)
        assert reason.startswith("nf4 packs linear layers alone, and the backbone has no linear layer to pack")

    def test_a_tuner_of_peft_that_would_train_in_bfloat16(self):
        backbone = task_of("synthetic").backbone(None, meta=True)
        lower(backbone, "bf16")
        reason = unfit(method_of("peft[type=ln_tuning]"), backbone)
        assert reason.startswith("PEFT's ln_tuning cannot adapt this backbone: it would train '")


@QUANTISED
class TestPacked:
    @pytest.mark.parametrize(("dtype", "most"), [("int8", 0.62), ("nf4", 0.40)])
    def test_numbers_are_counted_and_bytes_are_those_held(self, dtype, most):
        task = "synthetic[width=64]"
        whole, packed = backbone_in("fp32", task), backbone_in(dtype, task)
        for layer in whole.layers:
            assert packed.shape(layer) == whole.shape(layer)
            mine, other = (backbone.module.get_parameter(f"{layer}.weight") for backbone in (packed, whole))
            assert number_of(mine) == other.numel()
        parameters = [backbone.module.parameters() for backbone in (whole, packed)]
        assert sum(map(number_of, parameters[0])) == sum(map(number_of, parameters[1]))
        assert frozen_bytes(packed) < most * frozen_bytes(whole)

    @pytest.mark.parametrize("dtype", ["int8", "nf4"])
    def test_it_computes_about_what_the_backbone_does_in_training_and_evaluation(self, dtype):
        whole, packed = backbone_in("fp32"), backbone_in(dtype)
        tokens = torch.randint(1, 20, (4, 8), generator=torch.Generator().manual_seed(0))
        for backbone in (whole, packed):
            for part in backbone.module.modules():
                part.p = 0.0  # of dropout
        found = []
        for training in (True, False, True):
            mine, other = (b.module.train(training)(input_ids=tokens).logits for b in (packed, whole))
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-3)
            found.append(mine)
        assert torch.equal(found[0], found[2]), "an evaluation changed the backbone"

    @pytest.mark.parametrize("dtype", ["int8", "nf4"])
    @pytest.mark.parametrize("method", ON_PACKED)
    @pytest.mark.parametrize(
        "contract",
        [unchanged_output_at_the_start, only_the_intended_parameters_train, counts_are_right],
        ids=lambda contract: contract.__name__,
    )
    def test_methods(self, method, contract, dtype, tmp_path: Path):
        contract(Subject(PARAMETERS.get(method, method), tmp_path, batches=12, backbone_dtype=dtype))

    @pytest.mark.parametrize(
        "contract",
        [
            a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
            a_cut_to_a_rank_has_it_and_is_undone,
            the_same_seed_gives_the_same_record,
        ],
        ids=lambda contract: contract.__name__,
    )
    @pytest.mark.parametrize("method", ["lora", "adalora", "debora"])
    def test_runs_on_nf4(self, method, contract, tmp_path: Path):
        contract(Subject(PARAMETERS[method], tmp_path, batches=8, backbone_dtype="nf4"))

    @pytest.mark.parametrize("dtype", ["int8", "nf4"])
    @pytest.mark.parametrize("kind", ["lora", "ia3", "vera"])
    def test_tuners_of_peft(self, kind, dtype, tmp_path: Path):
        subject = Subject(f"peft[type={kind}]", tmp_path, batches=4, backbone_dtype=dtype)
        bare = subject.made_task().backbone(None, meta=True)
        lower(bare, dtype)
        assert unfit(method_of(subject.name), bare) is None
        only_the_intended_parameters_train(subject)

    def test_a_merge_is_refused(self, tmp_path):
        adaptation = start(Subject(PARAMETERS["debora"], tmp_path, backbone_dtype="nf4")).adaptation
        with pytest.raises(ValueError, match="packed into integers: merge into the backbone in bf16 or fp32"):
            adaptation.model.merge_adapter()

    @pytest.mark.parametrize("dtype", ["fp32", "nf4"])
    def test_a_run_says_nothing_of_the_library(self, dtype, tmp_path):
        """PEFT imports it where it is installed, whatever the backbone is held in."""
        given = ["--tasks", "synthetic", "--methods", "lora[rank=2]", "--batches", "2", "--seeds", "1"]
        given += ["--tracking-uri", "off"]
        given += ["--executor", "serial", "--backbone-dtype", dtype, "--results", str(tmp_path / "results")]
        done = subprocess.run([sys.executable, "-m", "harness", "run", *given], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
