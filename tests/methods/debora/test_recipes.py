"""What is not given: the defaults of a recipe, how a label names them, and what does not fit together."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from harness import registry
from harness.errors import InputError
from harness.notation import parse_choice
from methods.debora.method import Debora
from methods.debora.recipes import PAPER
from tests.methods.debora.bert import tiny_backbone

ARCHIVE = Path(__file__).parents[3] / "results" / "study" / "records.tar.xz"


def dumped(text: str) -> dict:
    """What a record holds of the method that the command line names."""
    return registry.make_method(*parse_choice(text)).model_dump(mode="json")


def test_what_a_recipe_says_is_written_out():
    found = dumped("debora[recipe=paper]")
    assert {name: found[name] for name in PAPER} == PAPER
    assert found["recipe"] == "paper"
    ours = dumped("debora")
    assert all(ours[name] != value for name, value in PAPER.items())


@pytest.mark.parametrize(
    ("name", "value"), [("fold", True), ("steps", "pairwise"), ("momentum", 0.5), ("warm_up", 0.1)]
)
def test_what_is_given_wins(name, value):
    assert getattr(Debora(recipe="paper", **{name: value}), name) == value


@pytest.mark.parametrize("recipe", ["paper", "v3"])
def test_what_is_given_wins_though_it_is_the_default_of_ours(recipe):
    given = {name: Debora.model_fields[name].default for name in PAPER if name != "factor_penalty"}
    found = Debora(recipe=recipe, **given)
    assert {name: getattr(found, name) for name in given} == given


LABELS = [
    "debora",
    "debora[recipe=paper]",
    "debora[recipe=v3]",
    "debora[geometry=oblique]",
    "debora[recipe=paper,geometry=stiefel]",
    "debora[recipe=v3,tau=8.0,geometry=stiefel,rank=4]",
    "debora[rank=4,components=12]",
    "debora[adapter_parameters=5000,budget_scope=layer]",
    "debora[recipe=paper,fold=true,steps=pairwise]",
    "debora[recipe=paper,hypergradient=free,momentum=0.9]",
    "debora[recipe=paper,hypergradient=direct,step_rule=backtracking]",
    "debora[hypergradient=path,path_points=2,factor_penalty=0.01]",
    'debora[recipe=paper,budget_scope=global,tau=16,target_modules=["query"]]',
]


@pytest.mark.parametrize("text", LABELS)
def test_a_label_makes_the_same_method(text):
    parameters = dumped(text)
    label = registry.label_of("debora", parameters)
    assert dumped(label) == parameters
    assert len(label) <= len(text), "it names nothing that follows"


def test_a_record_from_before_there_were_recipes_is_named_by_what_it_is_today():
    with tarfile.open(ARCHIVE) as archive:
        files = (archive.extractfile(member) for member in archive if member.name.endswith("/record.json"))
        specs = [json.loads(file.read())["spec"] for file in files]
    old = [spec for spec in specs if spec["method"] == "debora"]
    assert len(old) > 50
    labels = {registry.label_of("debora", spec["method_parameters"]): spec["method_parameters"] for spec in old}
    assert len(labels) > 5
    for label, parameters in labels.items():
        assert "recipe=v3" in label
        today = dumped(label)
        assert {name: today[name] for name in parameters} == parameters
        assert (today["steps"], today["fold"], today["factor_penalty"], today["warm_up"]) == ("away", False, 0.0, 0.0)


BOTH = {"components": 4, "adapter_parameters": 400}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (BOTH, "components = 4 and adapter_parameters = 400 are both set; give one of them"),
        ({"recipe": "paper", "factor_penalty": 0.1}, "factor_penalty = 0.1 is no part of recipe = paper"),
        ({"geometry": "oblique", "factor_penalty": 0.1}, "factor_penalty = 0.1 does nothing where geometry = oblique"),
        ({"warm_up": 0.4, "search_fraction": 0.4}, "warm_up = 0.4 should be below search_fraction = 0.4"),
        ({"step_rule": "backtracking"}, "hypergradient = free has no batch of the upper level"),
        ({"components": 0}, "debora.components = 0 is not allowed: it should be greater than or equal to 1"),
        ({"adapter_parameters": 0}, "debora.adapter_parameters = 0 is not allowed"),
        ({"penalty_share": 0}, "debora.penalty_share = 0 is not allowed: it should be greater than 0"),
        ({"recipe": "theirs"}, "debora.recipe = 'theirs' is not allowed"),
        ({"cut_by": "rank"}, "debora.cut_by = 'rank' is not allowed"),
    ],
)
def test_what_does_not_fit_together_is_one_line(values, message):
    with pytest.raises(InputError) as caught:
        Debora.of(values, owner="debora")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"components": 49}, "components = 49 is not allowed: rank 4 in 12 layers allows 1 to 48"),
        (
            {"adapter_parameters": 31},
            "adapter_parameters = 31 is not allowed: one component has 32, and all 48 have 1664",
        ),
        ({"adapter_parameters": 1665}, "adapter_parameters = 1665 is not allowed"),
        ({"adapter_parameters": 32, "fold": False}, "one component has 33, and all 48 have 1712"),
        (
            {"rank": 1, "budget_scope": "layer", "start_at": "vertex", "geometry": "stiefel"},
            "from start_at = vertex with rank = 1 a simplex has one: set steps = away, or a higher rank",
        ),
    ],
)
def test_what_does_not_fit_the_network_is_one_line(values, message):
    """Twelve layers of rank 4, of which four have 16 and 24 rows, the others 16 and 16."""
    with pytest.raises(InputError) as caught:
        Debora(**{"rank": 4} | values).unsupported(tiny_backbone("meta"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"components": 48}, {"adapter_parameters": 32}, {"adapter_parameters": 1664}])
def test_the_ends_of_what_is_allowed_are_allowed(values):
    assert Debora(rank=4, **values).unsupported(tiny_backbone("meta")) is None
