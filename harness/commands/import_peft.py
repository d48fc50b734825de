"""`import-peft`: results that PEFT reports of its own comparison, as tables of their own."""

from __future__ import annotations

from pathlib import Path

from harness.commands import target

NAME = "peft"  # of the files


def command(folder: Path, to: Path) -> int:
    """Print the results below `folder` and write them to `to` as peft.md, peft.tex and peft.csv. No record is read or
    written, so that nothing reported stands beside what was measured.

    Raises InputError for a folder of another schema, before anything is written, and a `to` that cannot be written.
    """
    from harness.report.forms import plain
    from harness.report.forms.data import csv_text
    from harness.report.forms.text import terminal_width
    from harness.report.tables import peft_suite

    found = peft_suite.read(folder)
    made = peft_suite.tables(found)
    texts = {
        "md": plain.markdown(peft_suite.TITLE, made),
        "tex": plain.latex(made, NAME),
        "csv": csv_text(peft_suite.frame(found)),
    }
    files = [to / f"{NAME}.{form}" for form in texts]
    for file in files:
        target.check_new(file, replaces=True)
    for file, text in zip(files, texts.values(), strict=True):
        with target.made(file, replaces=True) as draft:
            draft.write_text(text, encoding="utf-8")
    for table in made:
        print(f"\n{plain.console(table, terminal_width())}")
    print("\n" + "\n".join(f"reported  {file}" for file in files))
    return 0
