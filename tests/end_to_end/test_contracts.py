"""Every registered method and task keeps the contracts."""

import errno
import resource
from pathlib import Path

import pytest
import torch

from harness import registry
from harness.contracts import METHOD_CONTRACTS, TASK_CONTRACTS, Subject
from harness.contracts.methods import (
    a_cut_to_a_rank_has_it_and_is_undone,
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    counts_are_right,
    only_the_intended_parameters_train,
    the_history_holds_what_is_declared,
    unchanged_output_at_the_start,
)
from harness.contracts.subject import start
from harness.method import Backbone
from tests.support.contract_settings import PARAMETERS

METHODS = [PARAMETERS.get(name, name) for name in registry.registered(registry.METHODS)]


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_method(method, contract, tmp_path: Path):
    contract(Subject(method, tmp_path))


@pytest.mark.parametrize("method", METHODS)
def test_list_says_which_exports_stock_peft_cannot_load(method, tmp_path: Path):
    started = start(Subject(method, tmp_path))
    started.adaptation.export(tmp_path)
    assert started.method.own_format is not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "contract",
    [
        unchanged_output_at_the_start,
        only_the_intended_parameters_train,
        counts_are_right,
        a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
        a_cut_to_a_rank_has_it_and_is_undone,
    ],
    ids=lambda contract: contract.__name__,
)
@pytest.mark.parametrize("method", ["lora", "adalora", "debora"])
def test_method_on_a_backbone_in_bfloat16(method, contract, tmp_path: Path):
    contract(Subject(PARAMETERS[method], tmp_path, backbone_dtype=torch.bfloat16))


def test_only_the_backbone_is_in_a_lower_precision(tmp_path: Path):
    for method in ("lora", "adalora", "debora"):
        started = start(Subject(PARAMETERS[method], tmp_path, backbone_dtype=torch.bfloat16))
        dtypes = {(p.requires_grad, p.dtype) for _, p in started.adaptation.model.named_parameters()}
        assert (True, torch.bfloat16) not in dtypes
        assert {(True, torch.float32), (False, torch.bfloat16)} <= dtypes


@pytest.mark.parametrize(
    "method",
    [
        "debora[recipe=paper,rank=4,T_max=2,n0=3,step_rule=diminishing,step_size=1.0]",
        "debora[recipe=paper,rank=4,T_max=3,geometry=oblique]",
        "debora[rank=4,T_max=2,n0=1,step_size=0.5,components=5]",
    ],
)
def test_state_that_only_some_settings_need_is_saved_too(method, tmp_path: Path):
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one(Subject(method, tmp_path))


@pytest.mark.parametrize(
    "method",
    [
        "debora[recipe=paper,rank=4,T_max=2,geometry=oblique]",
        "debora[rank=4,T_max=2,hypergradient=implicit,iterations=2,components=3]",
        "peft[type=adamss,r=8,use_asa=true,asa_target_subspaces=10,init_warmup=1,final_warmup=5,mask_interval=2]",
    ],
)
def test_what_only_some_settings_write_is_declared_too(method, tmp_path: Path):
    the_history_holds_what_is_declared(Subject(method, tmp_path))


@pytest.mark.parametrize("method", [*METHODS, "lora[rank=4,init=pissa]", "peft[type=lokr]"])
def test_a_disk_that_is_full_at_the_export_is_an_oserror(method, tmp_path: Path):
    """So that it does not count as a failure of the run. The stand-in for the disk is a limit on the size of files."""
    adaptation = start(Subject(method, tmp_path)).adaptation
    adaptation.export(tmp_path / "whole")
    (weights,) = (tmp_path / "whole").glob("*.safetensors")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights.stat().st_size - 1, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            adaptation.export(tmp_path / "half")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("method", ["lora", "debora"])
def test_a_backbone_without_layers_is_a_reason(method):
    bare = Backbone(torch.nn.Embedding(3, 2), head=(), layers=())
    assert "no linear or convolution layer" in registry.make_method(method, {}).unsupported(bare)


@pytest.mark.parametrize("contract", TASK_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("task", ["synthetic", "digits"])
def test_task_without_files(task, contract, tmp_path: Path):
    contract(Subject(task, tmp_path))
