r"""Tables beside the leaderboard for the console, as Markdown and as LaTeX."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tabulate import tabulate

from harness.report.forms import latex_signs
from harness.report.forms.text import CONSOLE_WIDTH
from harness.report.forms.text import escape as escaped
from harness.report.names import StandIns, lines_of
from harness.report.tables.table import Entry, Table

Texts = list[str]  # a column of a table, its heading first
LINE_WIDTH = 345.0  # points: the narrowest of the usual classes (article); a wider table becomes several blocks
SIGN, SMALL_SIGN, GAP = 4.6, 3.9, 6.0  # points: a sign of \footnotesize and of \scriptsize, the space between columns
WIDEST_NAME = 120.0  # points, of a column of names
HEADING_SIGNS, NAME_SIGNS = 20, 36
MOST_ROWS = 40  # of a page


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
    r"""A table a setting, to be taken in with \input; beyond a page of rows a longtable. `name`: of their labels."""
    head = r"% Needs \usepackage{booktabs}, and \usepackage{longtable} beyond a page of rows."
    return "\n\n".join([head, *(_set(table, name) for table in tables)]) + "\n"


def _set(table: Table, name: str) -> str:
    """With numbers for what LaTeX may not know: the letters in comments above, the code points in the caption."""
    stand_ins = StandIns(r"[^\x00-\x7f]")

    def put(text: str) -> str:
        return stand_ins.put(text, "{{[}}{}{{]}}")

    blocks = [_block(table, places, put) for places in _blocks(table)]
    caption = put(" ".join(map(latex_signs.escape, [f"{table.title}.", table.caption, *table.notes])))
    caption += "".join(f" {latex_signs.escape(line)}." for line in stand_ins.key)
    caption = rf"\caption{{{caption}}}\label{{tab:{name}-{table.key}}}"
    style = rf"\footnotesize\setlength{{\tabcolsep}}{{{GAP / 2:g}pt}}"
    comments = [f"% [{number}] is {run}" for number, run in enumerate(stand_ins.runs, start=1)]
    if len(table.rows) > MOST_ROWS:
        parts = [_longtable(block, "" if place else caption) for place, block in enumerate(blocks)]
        return "\n".join([*comments, f"{{{style}", *parts, "}"])
    tabulars = "\n\\par\\medskip\n".join(map(_tabular, blocks))
    begin = [r"\begin{table}[tbp]", r"\centering", caption, rf"\medskip{style}"]
    return "\n".join([*comments, *begin, tabulars, r"\end{table}"])


class _Block(NamedTuple):
    """Some of the columns, as LaTeX."""

    alignment: str
    head: str
    body: str


def _tabular(block: _Block) -> str:
    lines = [r"\toprule", block.head, r"\midrule", block.body, r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{block.alignment}}}", *lines, r"\end{tabular}"])


def _longtable(block: _Block, caption: str) -> str:
    """With its head on every page, and the caption, if any, on the first."""
    head = "\n".join([r"\toprule", block.head, r"\midrule"])
    first = [rf"{caption} \\", head, r"\endfirsthead"] if caption else []
    lines = [*first, head, r"\endhead", block.body, r"\bottomrule"]
    return "\n".join([rf"\begin{{longtable}}{{{block.alignment}}}", *lines, r"\end{longtable}"])


def _blocks(table: Table) -> list[list[int]]:
    """Places of the columns, in as many groups as it takes to stay within the line, each begun by the names."""
    first = list(range(table.left))
    start = sum(_width(table, place) + GAP for place in first)
    blocks, used = [list(first)], start
    for place in range(table.left, len(table.headings)):
        width = _width(table, place) + GAP
        if used + width > LINE_WIDTH and len(blocks[-1]) > table.left:
            blocks.append(list(first))
            used = start
        blocks[-1].append(place)
        used += width
    return blocks


def _width(table: Table, place: int) -> float:
    """About how wide a column is, in points."""
    heading = max(len(line) * SIGN for line in _heading(table, place))
    of_rows = [
        len(row[place].text) * SIGN + (len(row[place].spread) + len(row[place].mark)) * SMALL_SIGN for row in table.rows
    ]
    widest = max([heading, *of_rows]) + SIGN
    return min(widest, WIDEST_NAME) if place < table.left else widest


def _heading(table: Table, place: int) -> list[str]:
    name, of = table.headings[place]
    return [*lines_of(name, HEADING_SIGNS), *(lines_of(of, HEADING_SIGNS) if of else [])]


def _block(table: Table, places: Sequence[int], put: Callable[[str], str]) -> _Block:
    left = [rf"p{{{_width(table, place):.0f}pt}}" for place in places[: table.left]]
    headings = [_heading(table, place) for place in places]
    heads = []
    for line in range(max(map(len, headings))):
        heads.append(" & ".join(latex_signs.escape(texts[line]) if line < len(texts) else "" for texts in headings))
    body = [
        " & ".join(_name(row[place]) if place < table.left else _number(row[place]) for place in places)
        for row in table.rows
    ]
    alignment = "".join(left) + "r" * (len(places) - table.left)
    head, rows = (put("\n".join(rf"{line} \\" for line in lines)) for lines in (heads, body))
    return _Block(alignment, head, rows)


def _name(entry: Entry) -> str:
    return rf"\raggedright {latex_signs.escape(spaced(entry.text))}"


def _number(entry: Entry) -> str:
    small = " ".join(part for part in (entry.spread, entry.mark) if part)
    return _math(entry.text) + (rf" {{\scriptsize {_math(small)}}}" if small else "")


def _math(text: str) -> str:
    """Text whose signed numbers are set as such: a minus, not a hyphen."""
    return re.sub(r"[+-]\d[\d.]*", r"$\g<0>$", latex_signs.escape(text)) if text != "-" else "--"
