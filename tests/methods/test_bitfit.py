"""BitFit: which numbers train."""

import pytest
import torch
from torch import nn

from harness import registry
from harness.contracts import Subject, start
from harness.method import Backbone


def test_the_biases_and_the_head_train_and_nothing_else(tmp_path):
    started = start(Subject("bitfit", tmp_path))
    before = {name: p.detach().clone() for name, p in started.before.module.named_parameters()}
    started.training.run(lambda training: None)
    after = dict(started.adaptation.model.named_parameters())
    head = {name for name, _ in started.before.head_parameters()}
    for name, value in before.items():
        trains = name in head or name.endswith(".bias")
        assert trains == after[name].requires_grad, name
        assert trains or torch.equal(value, after[name]), name
    assert not torch.equal(
        before["bert.encoder.layer.0.output.LayerNorm.bias"], after["bert.encoder.layer.0.output.LayerNorm.bias"]
    )


def test_counts(tmp_path):
    """Width 16, feed-forward 32, two layers: eight vectors of 16 and one of 32 in each, and the embeddings' norm."""
    started = start(Subject("bitfit", tmp_path))
    count = started.training.sizes.parameters()
    assert count.adapter_initial == count.adapter_final == 2 * (7 * 16 + 32) + 16
    assert count.total == sum(p.numel() for p in started.before.module.parameters())
    assert count.stored_bytes == 4 * (count.adapter_final + count.head)


@pytest.mark.parametrize("head", [(), ("1",)])
def test_a_backbone_without_biases_is_a_reason(head):
    backbone = Backbone(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=bool(head))), head, ("0",))
    assert registry.make_method("bitfit", {}).unsupported(backbone) == "the backbone has no bias"
