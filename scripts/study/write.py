"""Write the study from its records: results/study/README.md, tables, pictures, and the block in the project's README.

Every number in the text comes from the report's tables, through what `reading.md` (a Jinja2 template) calls.
Usage: python scripts/study/write.py     (reads results/study/records.tar.xz alone)
"""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from paper import Paper
from part import Part

from harness.report.board.selection import matching
from harness.report.forms import plain
from harness.report.forms.data import csv_text, tidy
from harness.report.forms.latex import latex
from harness.report.forms.text import markdown
from harness.report.pictures import curves, layers, scatter
from harness.report.pictures.figures import save
from harness.report.pictures.histories import traced
from harness.report.tables.differences import differences_table
from harness.report.tables.rank_agreement import agreement_table

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results" / "study"
MARKS = "<!-- study: written by scripts/study.sh -->", "<!-- end of the study -->"
OF_SEARCH = ("rank", "gap", "active_components")  # of dEBORA's history
BASELINES = ("lora", "debora[recipe=v3]", "lora[ranks_of=debora[recipe=v3]]")
WIDTHS = {"main": 384, "parts": 128, "convolutions": None}  # of the models' layers


def main() -> None:
    """Write everything."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(STUDY / "records.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        parts = {name: Part(Path(folder) / name, width) for name, width in WIDTHS.items()}
        _tables(parts)
        _pictures(**parts)
        _texts(parts | {"paper": Paper(parts["main"])})


def _tables(parts: dict[str, Part]) -> None:
    folder = STUDY / "tables"
    folder.mkdir(exist_ok=True)
    for name, part in parts.items():
        (folder / f"{name}.md").write_text(markdown([part.board]))
        (folder / f"{name}.tex").write_text(latex([part.board]))
        (folder / f"{name}.csv").write_text(csv_text(tidy([part.board])))
        baselines = matching(BASELINES, [row.label for row in part.board.rows])
        against = [differences_table(part.against(each)) for each in baselines]
        (folder / f"{name}_differences.md").write_text(plain.markdown("Differences", against))
    agreed = [agreement_table(part.board, part.agreed) for part in parts.values() if part.agreed]
    (folder / "ranks.md").write_text(plain.markdown("Agreement of seeds on ranks", agreed))


def _pictures(main: Part, parts: Part, convolutions: Part) -> None:
    folder = STUDY / "pictures"
    folder.mkdir(exist_ok=True)
    sentences = ["glue/sst2", "glue/stsb", "glue/mrpc"]
    search = main.only("debora*", columns=sentences)
    traces = {name: tuple(each for each in traces if each.name in OF_SEARCH) for name, traces in main.traces.items()}
    figures = {
        "main": scatter.draw(main.only("*", columns=[column.title for column in main.board.counted])),
        "sweeps": scatter.draw(
            parts.only("debora[recipe=v3]", "debora[recipe=v3,tau=*", "debora[recipe=v3,T_max=*", "lora*")
        ),
        "convolutions": scatter.draw(convolutions.board),
        "active_set": curves.over_time(search, traced(search, main.store, traces=traces)),
        "ranks": layers.rank_heat_map(main.only("debora[recipe=v3]", "adalora", columns=sentences), main.records),
    }
    for name, figure in figures.items():
        assert figure is not None, name
        save(figure, folder / f"{name}.png")


def _texts(known: dict[str, object]) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, from our own records
    )
    (STUDY / "README.md").write_text(environment.get_template("reading.md").render(known))
    block = environment.get_template("front.md").render(known)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n{block.strip()}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
