"""lora[placement=..., components=N]: how many components each layer gets, and that the rest is LoRA at these ranks."""

import collections
import itertools
import math
import re

import pytest
import torch
from peft import PeftModel
from torch import nn

from harness import registry
from harness.cli import main
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.errors import InputError
from harness.method import Backbone
from harness.record.store import RecordStore
from methods.shared.placement import Placement
from tests.support.refusals import assert_refused

RULES = ("random", "first", "last", "attention", "feed_forward")
DRAWN = ("random", "attention", "feed_forward")
BLOCK = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
LAYERS = ("embeddings.projection", *(f"encoder.layer.{n}.{name}" for n in range(3) for name in BLOCK), "pooler.dense")


def network(names, make=lambda: nn.Linear(6, 6)):
    """A backbone whose layers have these qualified names."""
    module = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        inner = module
        for parent in parents:
            if not hasattr(inner, parent):
                inner.add_module(parent, nn.Module())
            inner = getattr(inner, parent)
        inner.add_module(last, make())
    return Backbone(module, (), tuple(names))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ranks(rule, components, rank, seed=0, draw=0, layers=LAYERS):
    return Placement(rule, components, rank, draw).ranks(network(layers), tuple(layers), seeded(seed))


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("settings", ["placement=random,components=7", "placement=feed_forward,components=3,draw=1"])
def test_contracts(settings, contract, tmp_path):
    """With fewer components than layers."""
    contract(Subject(f"lora[rank=4,{settings}]", tmp_path))


class TestRules:
    @pytest.mark.parametrize("rule", RULES)
    def test_components_are_as_many_as_asked_for_and_no_layer_is_above_the_rank(self, rule):
        candidates = {"attention": 6, "feed_forward": 6}.get(rule, len(LAYERS))
        for rank, seed in itertools.product((1, 2, 5), (0, 1)):
            for components in range(1, rank * candidates + 1):
                found = ranks(rule, components, rank, seed)
                assert list(found) == list(LAYERS)
                assert sum(found.values()) == components
                assert 0 <= min(found.values()) <= max(found.values()) <= rank
        assert sum(rank == 5 for rank in found.values()) == candidates

    @pytest.mark.parametrize(("rule", "order"), [("first", LAYERS), ("last", LAYERS[::-1])])
    def test_by_depth_it_is_one_to_each_layer_round_and_round(self, rule, order):
        dealt = itertools.cycle(order)
        expected = dict.fromkeys(LAYERS, 0)
        for components in range(1, 3 * len(LAYERS) + 1):
            expected[next(dealt)] += 1
            for seed in (0, 1):
                assert ranks(rule, components, 3, seed) == expected

    @pytest.mark.parametrize("rule", ["attention", "feed_forward"])
    def test_of_a_kind_every_layer_gets_the_same_and_one_more_where_some_are_left_over(self, rule):
        own = [name for name in LAYERS if "layer." in name and ("attention" in name) == (rule == "attention")]
        for components in range(1, 4 * len(own) + 1):
            found = ranks(rule, components, 4)
            assert {name for name, rank in found.items() if rank} <= set(own)
            assert sorted(found[name] for name in own) == sorted(
                components // len(own) + (place < components % len(own)) for place in range(len(own))
            )

    @pytest.mark.parametrize("rule", DRAWN)
    def test_what_is_drawn_depends_on_seed_and_draw_alone(self, rule):
        found = [ranks(rule, 4, 3, seed, draw) for seed, draw in itertools.product((0, 1, 2), (0, 1, 2))]
        again = [ranks(rule, 4, 3, seed, draw) for seed, draw in itertools.product((0, 1, 2), (0, 1, 2))]
        assert found == again
        assert len({tuple(each.values()) for each in found}) > 5


def shares(rule, components, rank, layers, draws):
    """How often each result comes in so many seeds."""
    found = collections.Counter(
        tuple(ranks(rule, components, rank, seed, layers=layers).values()) for seed in range(draws)
    )
    return {result: times / draws for result, times in found.items()}


class TestChances:
    DRAWS = 2000

    def test_at_random_every_set_of_components_is_as_likely_as_another(self):
        """Three layers of rank 2, three components: against all 20 sets; five standard errors."""
        sets = list(itertools.combinations(range(6), 3))
        expected = collections.Counter(tuple(sum(i // 2 == layer for i in each) for layer in range(3)) for each in sets)
        found = shares("random", 3, 2, ("a", "b", "c"), self.DRAWS)
        assert found.keys() == expected.keys()
        for result, times in expected.items():
            share = times / len(sets)
            assert abs(found[result] - share) < 5 * math.sqrt(share * (1 - share) / self.DRAWS), result

    def test_what_is_left_over_of_a_kind_goes_to_each_layer_alike(self):
        layers = tuple(f"{n}.attn.q" for n in range(4))
        expected = {tuple(1 + (place in more) for place in range(4)) for more in itertools.combinations(range(4), 2)}
        found = shares("attention", 6, 2, layers, self.DRAWS)
        assert found.keys() == expected
        assert all(abs(share - 1 / 6) < 5 * math.sqrt(5 / 36 / self.DRAWS) for share in found.values())

    def test_the_dry_run_says_what_can_be_expected(self):
        """Against the mean number of layers without any over all sets."""
        layers = tuple("abcdefgh")
        sets = list(itertools.combinations(range(16), 4))
        without = sum(8 - len({i // 2 for i in each}) for each in sets) / len(sets)
        told = Placement("random", 4, 2).told(network(layers), layers)
        assert told == f"4 of 16 components, drawn for each seed, which leave about {without:.0f} of 8 layers none"

    @pytest.mark.parametrize("rule", ["first", "last", "attention", "feed_forward"])
    @pytest.mark.parametrize("components", [1, 5, 6, 12, 14, 17])
    def test_the_dry_run_says_how_many_layers_get_how_many(self, rule, components):
        backbone = network(LAYERS)
        own = Placement(rule, components, 3).candidates(backbone, LAYERS)
        counted = collections.Counter(ranks(rule, components, 3)[name] for name in own)
        told = Placement(rule, components, 3).told(backbone, LAYERS)
        found = {int(number): int(layers) for number, layers in re.findall(r"(\d+) in each of (\d+)", told)}
        assert found == counted
        assert ("drawn for each seed" in told) == (rule in DRAWN and components % len(own) > 0)


KINDS = {
    "attention": (
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.output.dense",
        "transformer.layer.1.attention.out_lin",
        "encoder.layer.0.attention.attn.o",
        "encoder.albert_layer_groups.0.albert_layers.0.attention.dense",
        "h.0.attn.c_attn",
        "h.0.attn.c_proj",
        "h.0.attn.attention.out_proj",
        "h.0.self_attention.query_key_value",
        "layers.0.attn.Wo",
        "model.layers.3.self_attn.o_proj",
        "encoder.layers.0.self_attn.out_proj",
        "decoder.layers.0.encoder_attn.k_proj",
        "decoder.block.0.layer.1.EncDecAttention.q",
    ),
    "feed_forward": (
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
        "transformer.layer.1.ffn.lin1",
        "encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
        "h.0.mlp.c_proj",
        "layers.0.mlp.Wo",
        "layers.0.mlp.dense_4h_to_h",
        "decoder.layers.0.fc2",
        "model.layers.3.mlp.gate_proj",
        "decoder.block.0.layer.2.DenseReluDense.wi_0",
        "blocks.0.ffn.down_proj",
        "layer.0.ff.layer_1",
    ),
    "neither": ("bert.pooler.dense", "encoder.embedding_hidden_mapping_in", "first", "0", "embeddings.projection"),
}


class TestKinds:
    @pytest.mark.parametrize("rule", ["attention", "feed_forward"])
    def test_names_of_the_common_families(self, rule):
        backbone = network([name for names in KINDS.values() for name in names])
        assert Placement(rule, 1, 1).candidates(backbone, backbone.layers) == KINDS[rule]

    def test_transposed_layers_and_convolutions(self):
        from transformers.pytorch_utils import Conv1D

        transposed, convolution = (
            network(["h.0.mlp.c_fc"], lambda: Conv1D(4, 4)),
            network(["layers.0.conv", "layers.0.attn.conv"], lambda: nn.Conv2d(2, 2, 1)),
        )
        feed_forward, attention = Placement("feed_forward", 1, 1), Placement("attention", 1, 1)
        assert feed_forward.candidates(transposed, transposed.layers) == transposed.layers
        assert feed_forward.candidates(convolution, convolution.layers) == ()
        assert attention.candidates(convolution, convolution.layers) == ("layers.0.attn.conv",)

    def test_a_backbone_without_the_kind_is_a_reason(self):
        for rule in ("attention", "feed_forward"):
            method = registry.make_method("lora", {"placement": rule, "components": 1, "rank": 2})
            assert "none of the layers to adapt is of that kind" in method.unsupported(network(KINDS["neither"]))
            assert method.unsupported(network(LAYERS)) is None


def trained(name, folder):
    started = start(Subject(name, folder), seed=3)
    started.training.run(lambda training: None)
    return started


class TestTraining:
    @pytest.mark.parametrize("rule", RULES)
    def test_it_is_lora_at_these_ranks_bit_for_bit(self, rule, tmp_path):
        placed = trained(f"lora[rank=4,placement={rule},components=9]", tmp_path)
        found = placed.adaptation.ranks()
        assert sum(found.values()) == 9
        pattern = ",".join(f'"{name}"={rank}' for name, rank in found.items())
        by_hand = trained(f"lora[rank=4,rank_pattern={{{pattern}}}]", tmp_path)
        assert by_hand.adaptation.ranks() == found
        for layer in placed.adaptation.layers.values():
            assert layer.scaling["default"] == pytest.approx(16 / 4), "whatever the layer's own rank is"
        assert placed.training.history == by_hand.training.history
        state = by_hand.adaptation.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in placed.adaptation.model.state_dict().items())

    @pytest.mark.parametrize("draw", [0, 2])
    def test_at_random_it_has_the_ranks_of_pruning_at_random_from_the_start(self, draw, tmp_path):
        own = start(Subject(f"lora[rank=4,placement=random,components=9,draw={draw}]", tmp_path), seed=5)
        settings = f"selection=random,prune_at=0,components=9,draw={draw}"
        other = start(Subject(f"pruned_lora[rank=4,{settings}]", tmp_path), seed=5)
        assert own.adaptation.ranks() == other.adaptation.ranks()

    def test_an_export_is_a_stock_lora(self, tmp_path):
        started = trained("lora[rank=4,placement=random,components=9]", tmp_path)
        started.adaptation.export(tmp_path / "x")
        loaded = PeftModel.from_pretrained(started.before.module, str(tmp_path / "x"))
        batch = started.task.collate(started.training.encoded, range(8), None)
        with torch.no_grad():
            found, expected = (m.eval()(**batch.inputs).logits for m in (loaded, started.adaptation.model))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_runs_of_a_sweep_differ_in_their_seed_alone(self, tmp_path):
        methods = (
            'lora[placement=random,components=5],lora[placement=first,components=5,target_modules=["query","value"]]'
        )
        where = ["--results", str(tmp_path), "--executor", "serial"]
        assert (
            main(["run", "--tasks", "synthetic", "--batches", "3", "--seeds", "2", "--methods", methods, *where]) == 0
        )
        records = RecordStore(tmp_path).records()
        drawn = {r.spec.seed: r.ranks for r in records if r.spec.method_parameters["placement"] == "random"}
        first = [r.ranks for r in records if r.spec.method_parameters["placement"] == "first"]
        assert drawn[0] != drawn[1]
        assert [sum(each.values()) for each in (*drawn.values(), *first)] == [5, 5, 5, 5]
        assert first[0] == first[1]


BAD = [
    ("placement=random", "placement = random needs components: how many in all layers together"),
    ("placement=randon,components=3", "lora.placement"),
    ("components=3", "components = 3 needs placement: random, first, last, attention, feed_forward"),
    ("draw=1", "draw = 1 needs placement: random, first"),
    ("placement=first,components=3,draw=1", "draw = 1 with placement = first: nothing is drawn there"),
    ("placement=first,components=0", "lora.components = 0 is not allowed"),
    ('placement=first,components=3,ranks="a"', "placement = first sets the ranks, and so does ranks: give one"),
    ("placement=first,components=3,ranks_of=full", "placement = first sets the ranks, and so does ranks_of: give one"),
    ('placement=last,components=3,rank_pattern={"query"=1}', "sets the ranks, and so does rank_pattern: give one"),
    ("placement=last,components=3,parameters=9", "placement = last sets the ranks, and so does parameters: give one"),
    ("placement=last,components=3,parameters_of=full", "sets the ranks, and so does parameters_of: give one"),
    ("placement=last,components=3,shuffle_ranks=true", "shuffle_ranks = true has nothing to shuffle"),
    ("placement=last,components=3,init=orthogonal", "init = orthogonal takes even ranks"),
    ("placement=random,components=97", "components = 97 is above the 96 that rank = 8 gives 12 layers"),
    ("placement=feed_forward,components=33", "components = 33 is above the 32 that rank = 8 gives 4 layers"),
    ("placement=first,components=3,rank=17", "rank = 17 is above the smaller side of layer"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"lora[{settings}]", message, tmp_path, capsys)


def test_a_task_without_attention_is_a_reported_cell(tmp_path, capsys):
    methods = "lora[placement=attention,components=3]"
    where = ["--results", str(tmp_path), "--executor", "serial"]
    main(["run", "--tasks", "digits", "--batches", "2", "--seeds", "1", "--methods", methods, *where])
    assert "unsupported: placement = attention: by their names, none of" in capsys.readouterr().out
    (record,) = RecordStore(tmp_path).records()
    assert record.status == "unsupported"


def test_more_components_than_there_are_is_no_reason_but_an_error():
    with pytest.raises(InputError, match="components = 13 is above the 12 that rank = 2 gives 6 layers"):
        Placement("attention", 13, 2).misfit(network(LAYERS), LAYERS)
