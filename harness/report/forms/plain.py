r"""Tables beside the leaderboard for the console, as Markdown and as LaTeX."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tabulate import tabulate

from harness.report.forms import latex_table
from harness.report.forms.latex_cells import Text, joined, plain, small
from harness.report.forms.text import CONSOLE_WIDTH
from harness.report.forms.text import escape as escaped
from harness.report.tables.table import Entry, Table

Texts = list[str]  # a column of a table, its heading first
NAME_SIGNS = 36


def console(table: Table, width: int = CONSOLE_WIDTH) -> str:
    """The table in as many blocks as it takes to stay within `width` signs, each begun by the rows' names."""
    columns = []
    for place, (name, of) in enumerate(table.headings):
        texts = [str(row[place]) for row in table.rows]
        shown = [_folded(text) for text in texts] if place < table.left else texts
        columns.append([f"{name}\n{of}" if of else name, *shown])
    first, others = columns[: table.left], columns[table.left :]
    blocks = [list(first)]
    for column in others:
        lines = _aligned([*blocks[-1], column], table.left, "simple").splitlines()
        if len(blocks[-1]) > table.left and max(map(len, lines)) > width:
            blocks.append(list(first))
        blocks[-1].append(column)
    notes = [f"{table.title}. {table.caption}", *table.notes]
    notes = [textwrap.fill(note, width, subsequent_indent="  ", break_on_hyphens=False) for note in notes]
    return "\n".join(
        [notes[0], "", "\n\n".join(_aligned(block, table.left, "simple") for block in blocks), "", *notes[1:]]
    )


def _folded(name: str) -> str:
    return textwrap.fill(spaced(name), NAME_SIGNS, break_on_hyphens=False)


def spaced(name: str) -> str:
    """A row's label as it can be broken into lines."""
    return re.sub(r",(?=\S)", ", ", name)


def markdown(title: str, tables: Iterable[Table]) -> str:
    """Every table as a section."""
    parts = [f"# {title}"]
    for each in tables:
        parts += [f"## Setting {each.key}", escaped(f"{each.title}. {each.caption}"), table(each)]
        parts += ["\n".join(f"- {escaped(note)}" for note in each.notes)]
    return "\n\n".join(parts) + "\n"


def table(found: Table) -> str:
    """A table alone, as Markdown."""
    columns = []
    for place, (name, of) in enumerate(found.headings):
        columns.append([f"{name} ({of})" if of else name, *(str(row[place]) for row in found.rows)])
    return _aligned([[escaped(text) for text in column] for column in columns], found.left, "github")


def _aligned(columns: Sequence[Texts], left: int, form: str) -> str:
    headings, *rows = zip(*columns, strict=True)
    alignment = ["left"] * left + ["right"] * (len(columns) - left)
    return tabulate(rows, headings, tablefmt=form, disable_numparse=True, colalign=alignment)


def latex(tables: Iterable[Table], name: str) -> str:
    r"""The tables as those of leaderboards are, to be taken in with \input. `name`: of their labels, with the setting's
    key, and a number from a setting's second table on."""
    labels: Counter[str] = Counter()
    made = []
    for table in tables:
        label = f"{name}-{table.key}"
        labels[label] += 1
        made.append(_latex(table, label if labels[label] == 1 else f"{label}-{labels[label]}"))
    return latex_table.document(made)


def _latex(table: Table, label: str) -> latex_table.Table:
    left, right = table.left, len(table.headings) - table.left
    return latex_table.Table(
        label=label,
        caption=f"{table.title}. {table.caption}",
        header=["\n".join(heading) for heading in table.headings],
        parts=[latex_table.Part([[*map(_name, row[:left]), *map(_number, row[left:])] for row in table.rows])],
        sides="l" * left + "r" * right,
        notes=table.notes,
        left=left,
    )


def _name(entry: Entry) -> Text:
    return plain(spaced(entry.text))


def _number(entry: Entry) -> Text:
    texts = [_signed(entry.text, plain)]
    beside = " ".join(part for part in (entry.spread, entry.mark) if part)
    return joined([*texts, _signed(beside, small)] if beside else texts)


def _signed(text: str, of: Callable[[str], Text]) -> Text:
    """Text whose signed numbers are set as such: a minus, not a hyphen."""
    made = of(text)
    return made if text == "-" else made._replace(latex=re.sub(r"[+-]\d[\d.]*", r"$\g<0>$", made.latex))
