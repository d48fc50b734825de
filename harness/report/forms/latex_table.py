r"""Tables as LaTeX that people edit: a line of source for each row, nothing nested.

A table that is wider than the line becomes several blocks, each begun by the columns that name a row. One that is
taller than a page becomes longtables. Sizes are those of the article class at 10 points, the narrowest of the usual
ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.report.forms.latex_cells import BOLD, SCRIPT, Text, plain, points, running
from harness.report.names import StandIns, lines_of
from harness.report.redact import one_line

LINE_WIDTH, PAGE_HEIGHT = 345.0, 530.0  # points
GAP = 6.0  # points between columns
WIDEST_FIRST, WIDEST = 130.0, 150.0  # points of a column; longer texts are broken into lines within the cell
HEADING = 16  # signs in a line of a column's heading
ROW, RULES, NOTE, CAPTION = 9.5, 16.0, 8.5, 12.0  # points: height of a line of the table, of its rules, of texts
PACKAGES = {
    r"\toprule": "booktabs",
    ">{": "array",
    r"\begin{longtable}": "longtable",
    r"\textcolor{": "xcolor",
    r"\num{": "siunitx",
}
SIUNITX = r"\sisetup{separate-uncertainty,detect-weight}"


@dataclass(frozen=True)
class Part:
    """Rows of a table that stand together, below a rule."""

    rows: Sequence[Sequence[Text]]
    title: str = ""  # above them; "" for none
    grey: bool = False


@dataclass(frozen=True)
class Table:
    """A table; `caption`, `header` and `notes` are any text, `sides` how each column is set: "l" or "r".

    header: of each column, in lines of its own where it has several.
    left: how many of the first columns name a row.
    """

    label: str
    caption: str
    header: Sequence[str]
    parts: Sequence[Part]
    sides: str
    notes: Sequence[str] = ()
    left: int = 1


def document(tables: Iterable[Table], comments: Iterable[str] = ()) -> str:
    r"""The tables as a file to be taken in with \input, which says what it needs; `comments` stand at its head."""
    made = "\n\n".join(map(_environment, tables))
    needed = ",".join(name for sign, name in PACKAGES.items() if sign in made)
    setup = SIUNITX if "siunitx" in needed else ""
    head = [rf"% In the preamble: \usepackage{{{needed}}}{setup}", *(f"% {one_line(comment)}" for comment in comments)]
    return "\n".join(head) + f"\n\n{made}\n"


@dataclass(frozen=True)
class _Column:
    """One column of a block, with all of its cells."""

    heading: list[str]
    texts: list[Text]
    side: str
    most: float  # points that it may be wide

    @functools.cached_property
    def natural(self) -> float:
        return max([text.width for text in self.texts] + [points(line) for line in self.heading])

    @property
    def width(self) -> float:
        return min(self.natural, self.most)

    @property
    def form(self) -> str:
        """How LaTeX is told to set it."""
        if self.natural <= self.most:
            return self.side
        return rf">{{\raggedright\arraybackslash\hangindent=1em}}p{{{self.most:g}pt}}"

    def lines(self, text: Text) -> int:
        """About how many lines a cell has."""
        return 1 if text.width <= self.most else math.ceil(1.3 * text.width / self.most)


def _environment(table: Table) -> str:
    """The table, with numbers for what LaTeX may not know: the letters are in comments above it, the code points in
    notes below."""
    stand_ins = StandIns(r"[^\x00-\x7f]")
    blocks = _blocks(table)
    sizes = rf"\footnotesize\setlength{{\tabcolsep}}{{{GAP / 2:g}pt}}"
    caption = rf"\caption{{{running(table.caption)}}}\label{{tab:{table.label}}}"
    if _height(table, blocks) <= PAGE_HEIGHT:
        start = [r"\begin{table}[tbp]", r"\centering\emergencystretch=3em", caption, r"\medskip" + sizes]
        between, end = [r"\par\medskip"], [r"\end{table}"]
        bodies = [_tabular(block, table.parts) for block in blocks]
    else:
        start = [r"\begingroup\emergencystretch=3em\setlength{\LTcapwidth}{\linewidth}", sizes]
        between, end = [], [r"\endgroup"]
        bodies = [_longtable(block, table.parts, caption if block is blocks[0] else "") for block in blocks]
    lines = [*bodies[0], *itertools.chain.from_iterable([*between, *body] for body in bodies[1:])]
    lines = [stand_ins.put(line) for line in [*start, *lines]]
    notes = [stand_ins.put(running(note)) for note in table.notes] + list(map(running, stand_ins.key))
    if notes:
        lines += [
            r"\par\smallskip",
            r"{\scriptsize\raggedright\parindent=0pt",
            *(rf"{note}\par" for note in notes),
            "}",
        ]
    comments = [f"% [{number}] is {one_line(run)}" for number, run in enumerate(stand_ins.runs, start=1)]
    return "\n".join([*comments, *lines, *end])


def _blocks(table: Table) -> list[list[_Column]]:
    """The columns in as many groups as it takes to stay within the line, each begun by those that name a row."""
    rows, left = [row for part in table.parts for row in part.rows], table.left
    columns = [
        _Column(
            lines_of(heading, HEADING), [row[place] for row in rows], side, WIDEST_FIRST if place < left else WIDEST
        )
        for place, (heading, side) in enumerate(zip(table.header, table.sides, strict=True))
    ]
    first = columns[:left]
    start = sum(column.width + GAP for column in first)
    blocks, used = [[*first]], start
    for column in columns[left:]:
        if used + column.width + GAP > LINE_WIDTH and len(blocks[-1]) > left:
            blocks.append([*first])
            used = start
        blocks[-1].append(column)
        used += column.width + GAP
    return blocks


def _tabular(block: Sequence[_Column], parts: Sequence[Part]) -> list[str]:
    """The block as lines of source."""
    start = [rf"\begin{{tabular}}{{{_forms(block)}}}", *_header(block)]
    return [*start, *_body(block, parts), r"\bottomrule", r"\end{tabular}"]


def _longtable(block: Sequence[_Column], parts: Sequence[Part], caption: str) -> list[str]:
    """The block, to be broken over pages; without a caption it is the table before it, which goes on."""
    head = _header(block)
    first = [caption + r" \\", *head, r"\endfirsthead"] if caption else []
    start = [rf"\begin{{longtable}}{{{_forms(block)}}}", *first, *head, r"\endhead", r"\bottomrule", r"\endfoot"]
    end = [r"\end{longtable}"] if caption else [r"\end{longtable}", r"\addtocounter{table}{-1}"]
    return [*start, *_body(block, parts), *end]


def _forms(block: Sequence[_Column]) -> str:
    return "".join(column.form for column in block)


def _header(block: Sequence[_Column]) -> list[str]:
    """The headings between rules, those of several lines in several rows, the last lines beside each other."""
    height = max(len(column.heading) for column in block)
    padded = [[""] * (height - len(column.heading)) + column.heading for column in block]
    rows = [_row([plain(line).latex for line in lines]) for lines in zip(*padded, strict=True)]
    return [r"\toprule", *rows, r"\midrule"]


def _body(block: Sequence[_Column], parts: Sequence[Part]) -> list[str]:
    lines: list[str] = []
    rows = zip(*(column.texts for column in block), strict=True)
    for place, part in enumerate(parts):
        if place:
            lines.append(r"\midrule")
        if part.title:
            lines.append(_title(part.title, block))
        for texts in itertools.islice(rows, len(part.rows)):
            cells = [text.latex for text in texts]
            lines.append(_row([rf"\textcolor{{gray}}{{{cell}}}" for cell in cells] if part.grey else cells))
    return lines


def _title(title: str, block: Sequence[_Column]) -> str:
    """A row with a heading over all columns."""
    width = sum(column.width + GAP for column in block) - GAP
    fits = points(title) <= width
    form, ragged = ("l", "") if fits else (f"p{{{width:.0f}pt}}", r"\raggedright")
    return _row([rf"\multicolumn{{{len(block)}}}{{{form}}}{{{ragged}\itshape {running(title)}}}"])


def _row(cells: Sequence[str]) -> str:
    """A line of source. It never begins with what LaTeX would take for an option of the row's end before it."""
    line = " & ".join(cells) + r" \\"
    return "{}" + line if line.startswith(("[", "*")) or not line[0].isascii() else line


def _height(table: Table, blocks: Sequence[Sequence[_Column]]) -> float:
    """About how high the table is, in points, from above."""
    texts = CAPTION * (2 + _lines(table.caption, BOLD)) + sum(NOTE * _lines(note, SCRIPT / 8.5) for note in table.notes)
    titles = sum(bool(part.title) for part in table.parts) * 2
    rules = RULES + 6 * len(table.parts)
    for block in blocks:
        header = max(len(column.heading) for column in block)
        rows = zip(*(map(column.lines, column.texts) for column in block), strict=True)
        texts += rules + ROW * (header + titles + sum(map(max, rows)))
    return texts


def _lines(text: str, size: float) -> int:
    return math.ceil(points(text) * size / (0.95 * LINE_WIDTH))
