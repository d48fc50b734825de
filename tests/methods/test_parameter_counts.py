"""Parameter counts on DeBERTaV3-base, built from its configuration on the meta device: no weights, no files."""

import pytest
import torch

from harness import registry
from harness.contracts import Subject, start
from harness.contracts.subject import method_of
from harness.method import in_modules
from harness.run.sizes import Sizes
from harness.spec import TrainSpec
from tasks.glue import Glue
from tests.support.deberta import base_config

LAYERS, WIDTH, INNER = 12, 768, 3072
LINEAR = 6 * LAYERS  # query, key, value, attention output, intermediate, output
ONE_RANK = LAYERS * (4 * 2 * WIDTH + 2 * (WIDTH + INNER))  # numbers of one rank everywhere: 165,888
OUTPUTS = LAYERS * (4 * WIDTH + INNER + WIDTH)
POOLER = WIDTH * WIDTH + WIDTH
HEAD = POOLER + 3 * WIDTH + 3  # and a classifier of MNLI's three classes
BIASES = LAYERS * (4 * WIDTH + INNER + WIDTH + 2 * WIDTH) + 2 * WIDTH  # with two norms outside the blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("deberta-v3-base")
    base_config().save_pretrained(path)
    return str(path)


@pytest.fixture
def backbone(folder):
    return Glue.of({"member": "mnli"}, "glue/mnli").backbone(folder, meta=True)


def test_the_head_and_the_layers(backbone):
    head = dict(backbone.head_parameters())
    assert sum(p.numel() for name, p in head.items() if in_modules(name, ("pooler",))) == POOLER == 590_592
    assert sum(p.numel() for p in head.values()) == HEAD
    assert len(backbone.layers) == LINEAR == 72
    assert sum(sum(backbone.shape(layer)) for layer in backbone.layers) == ONE_RANK == 165_888


@pytest.mark.parametrize(
    ("method", "numbers", "ranks"),
    [
        ("head", 0, None),
        ("bitfit", BIASES, None),
        ("lora[rank=8]", 1_327_104, LINEAR * [8]),
        ("lora[rank=2]", 331_776, LINEAR * [2]),
        ("lora[rank=2,dora=true]", 331_776 + OUTPUTS, LINEAR * [2]),
        ('lora[rank=2,target_modules=["query_proj"]]', LAYERS * 2 * 2 * WIDTH, LAYERS * [2]),
        ('lora[rank=2,rank_pattern={"query_proj"=0}]', 331_776 - LAYERS * 4 * WIDTH, LAYERS * [0, 2, 2, 2, 2, 2]),
        ("lora[rank=2,init=pissa]", 331_776, LINEAR * [2]),
        ("pruned_lora[rank=8]", 1_327_104, LINEAR * [8]),
        ("debora[rank=8]", 1_327_104 + LINEAR * 8, LINEAR * [8]),
    ],
)
def test_counts_at_the_start(method, numbers, ranks, backbone):
    whole = sum(p.numel() for p in backbone.module.parameters())
    adaptation = method_of(method).start(backbone, TrainSpec(batches=9), FewRows(), torch.Generator().manual_seed(0))
    count = Sizes(adaptation).parameters()
    assert count.adapter_initial == count.adapter_peak == count.adapter_final == numbers
    assert count.head == HEAD
    assert count.total == whole + (0 if method in ("head", "bitfit") else numbers)
    twice = 2 if "pissa" in method else 1  # an export holds what the init took out of the backbone as well
    assert count.stored_bytes == 4 * (twice * numbers + HEAD)
    assert list(adaptation.ranks().values()) == (ranks or [])


class FewRows:
    size = 2


def test_full_fine_tuning_counts_the_backbone_without_the_head(backbone):
    whole = sum(p.numel() for p in backbone.module.parameters())
    count = Sizes(method_of("full").start(backbone, None, FewRows(), torch.Generator())).parameters()
    assert (count.adapter_final, count.head, count.total) == (whole - HEAD, HEAD, whole)
    assert count.stored_bytes == 4 * whole


def test_the_rank_nearest_to_a_reported_number(backbone):
    """0.4M, the reported size of a dEBORA adapter, is nearest to a LoRA of rank 2."""
    method = registry.make_method("lora", {"parameters": 400_000})
    assert method.resolve(backbone, None).rank == 2


def test_initial_peak_and_final_are_told_apart(tmp_path):
    """One rank costs 448 numbers over the 12 layers of the synthetic task."""
    started = start(Subject("pruned_lora[rank=4,components=6,selection=random]", tmp_path))
    started.training.run(lambda training: None)
    count, ranks = started.training.sizes.parameters(), started.adaptation.ranks()
    left = sum(rank * sum(started.before.shape(layer)) for layer, rank in ranks.items())
    assert sum(ranks.values()) == 6
    assert (count.adapter_initial, count.adapter_peak, count.adapter_final) == (4 * 448, 4 * 448, left)
    backbone = sum(p.numel() for p in started.before.module.parameters())
    assert count.total == backbone + left
    assert count.stored_bytes == 4 * (left + count.head)
