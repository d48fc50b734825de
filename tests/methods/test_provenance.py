"""Where every method comes from is stated, in its class and in docs/methods, in the same words."""

import re
from pathlib import Path

import pytest

from harness import registry
from harness.provenance import FORMS, GROUPS, NOT_STATED, OPEN, OURS, is_allowed

PAGES = Path(__file__).parents[2] / "docs" / "methods"
OWN = {  # of this project; others may be installed beside it
    name: registry.method_class(name)
    for name, (entry, *_) in registry.registered(registry.METHODS).items()
    if entry.value.startswith("methods.")
}
ROW = re.compile(r"\| (?P<group>[^|]+) \| \[`(?P<name>\w+)`\]\((?P<page>[\w.]+)\) \| [^|]+ \| (?P<provenance>[^|]+) \|")
ROWS = [found.groupdict() for line in (PAGES / "README.md").read_text().splitlines() if (found := ROW.fullmatch(line))]


@pytest.mark.parametrize("name", OWN)
def test_every_method_says_where_it_comes_from_and_where_it_stands(name):
    assert is_allowed(OWN[name].provenance)
    assert OWN[name].group in GROUPS


def test_the_table_has_every_method_in_its_group_with_its_own_words():
    assert [row["name"] for row in ROWS] == sorted((row["name"] for row in ROWS), key=lambda n: (place(n), n))
    assert {row["name"] for row in ROWS} == OWN.keys()
    for row in ROWS:
        method = OWN[row["name"]]
        assert (row["group"], row["provenance"]) == (method.group, method.provenance)


def place(name):
    return list(GROUPS).index(OWN[name].group)


def test_the_groups_are_told_in_the_words_of_list():
    found = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (PAGES / "README.md").read_text(), re.MULTILINE)
    assert [row for row in found if row[0] in GROUPS] == list(GROUPS.items())


@pytest.mark.parametrize("name", OWN)
def test_every_method_has_a_page_that_begins_with_its_provenance(name):
    (page,) = [row["page"] for row in ROWS if row["name"] == name]
    heading, _, second, *_ = (PAGES / page).read_text().splitlines()
    assert heading == f"# `{name}`"
    assert second == f"Provenance: {OWN[name].provenance}."


@pytest.mark.parametrize("words", [*FORMS, "PEFT's; ranks are ours", f"{OPEN}the rounding", f"{OURS}a control"])
def test_allowed_words(words):
    assert is_allowed(words)


@pytest.mark.parametrize(
    "words", ["", NOT_STATED, "PEFT", "PEFT's; ", "from the papers", OPEN, OURS, "ours", "x PEFT's"]
)
def test_other_words(words):
    assert not is_allowed(words)
