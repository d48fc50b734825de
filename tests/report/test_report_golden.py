"""Tables of committed sample records, compared to the last sign with committed ones.

After a change that is meant: `python -m tests.report.test_report_golden` writes the tables again; read what `git diff`
shows.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from harness.record.record import RunRecord
from harness.report.build import build_report
from harness.report.known import Known
from tests.support.report_records import NAMING, stored

GOLDEN = Path(__file__).parent / "golden"
PROVENANCE = {
    "lora": "PEFT's",
    "debora": "from the paper; no official code",
    "hadapter": "from the paper",
    "head": "common practice",
}
TABLES = ("leaderboard.md", "leaderboard.tex", "leaderboard.csv", "costs.csv", "learning_rates.csv", "rank_aurac.csv")


def tables(folder: Path) -> dict[str, str]:
    """The tables of the sample records: lora as given, debora after a search of two trials a task, the head alone,
    which diverged on a seed, and a method that does not fit."""
    lines = (GOLDEN / "records.jsonl").read_text(encoding="utf-8").splitlines()
    store = stored(folder, *map(RunRecord.model_validate_json, lines))
    build_report(store, naming=NAMING, known=Known(provenance=PROVENANCE))
    return {name: (folder / "tables" / name).read_text(encoding="utf-8") for name in TABLES}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tables(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str, made: dict[str, str]) -> None:
    assert made[name] == (GOLDEN / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    for name, text in tables(Path(tempfile.mkdtemp())).items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
