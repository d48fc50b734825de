"""What is kept is what was written: checksums, identities, versions, and disks that are full."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import storage
from harness.cli import main
from harness.contracts import Subject, spec_of
from harness.record import cells
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.run import checkpoint
from harness.run.run import run_one
from harness.spec import Place
from harness.storage import Damaged, Unreadable, Unwritable

ROOT = Path(__file__).parents[2]
COMMAND = ["run", "--executor", "serial", "--tasks", "synthetic", "--methods", "head,lora[rank=2]", "--batches", "4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of two runs."""
    results = tmp_path_factory.mktemp("made") / "results"
    assert main([*COMMAND, "--save-adapter", "--results", str(results)]) == 0
    return results


@pytest.fixture
def store(made: Path, tmp_path: Path) -> RecordStore:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "results")
    return RecordStore(tmp_path / "results")


def again(store: RecordStore, *options: str) -> int:
    return main([*COMMAND, *options, "--results", str(store.results)])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))


def make_newer(path: Path) -> None:
    text, number = re.subn(r'"schema_version": \d', '"schema_version": 9', path.read_text())
    assert number
    path.write_text(text)


class TestRecords:
    @pytest.mark.parametrize("bit", [0, 4])
    def test_no_flipped_bit_is_believed(self, store: RecordStore, bit: int) -> None:
        run_id = store.run_ids()[0]
        path = store.folder(run_id) / "record.json"
        whole, content = path.read_bytes(), json.loads(path.read_bytes())
        for place in range(bit, len(whole), 13):
            path.write_bytes(whole)
            flip(path, place, bit)
            with contextlib.suppress(ValueError):
                if json.loads(path.read_bytes()) == content:  # the last digit of a number may say nothing
                    continue
            for read in (store.read, store.skim):
                with contextlib.suppress(Unreadable):  # a flip in its version
                    assert read(run_id) is None, f"byte {place}"
        path.write_bytes(whole)
        assert store.read(run_id) is not None

    def test_spacing_and_order_are_no_content(self, store: RecordStore) -> None:
        run_id = store.run_ids()[0]
        record, path = store.read(run_id), store.folder(run_id) / "record.json"
        path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
        assert store.read(run_id) == record

    def test_a_skim_agrees_with_the_whole(self, store: RecordStore) -> None:
        for record in store.records():
            place = record.spec.place
            text = place.forgetting, place.forgetting_windows
            expected = (record.status, record.seconds.total, place.rank_curve, text, record.files)
            assert store.skim(record.run_id) == expected

    def test_a_record_survives_its_own_text(self, store: RecordStore) -> None:
        for record in store.records():
            assert RunRecord.parse(record.to_json()) == record
            assert RunRecord.model_validate_json(record.to_json()) == record

    @pytest.mark.parametrize("name", ["history.jsonl", "predictions.safetensors", "adapter/trained.safetensors"])
    def test_files_beside_a_record_are_known_by_it(self, store: RecordStore, name: str) -> None:
        run_id = next(record.run_id for record in store.records() if record.spec.method == "head")
        path = store.verified(run_id, name)
        flip(path, len(path.read_bytes()) // 2)
        with pytest.raises(Damaged, match=f"'{name}' of run '{run_id}' is not what the run wrote"):
            store.verified(run_id, name)
        path.unlink()
        path.symlink_to(ROOT / "README.md")
        with pytest.raises(Damaged):
            store.verified(run_id, name)
        with pytest.raises(FileNotFoundError):
            store.verified(run_id, "never.json")

    def test_a_copied_folder_hides_no_cell(self, store: RecordStore, capsys: pytest.CaptureFixture[str]) -> None:
        first, second = store.run_ids()
        shutil.rmtree(store.folder(second))
        shutil.copytree(store.folder(first), store.folder(second))
        assert store.read(second) is None
        assert store.skim(second) is None
        assert store.damaged() == [second]
        assert again(store) == 0
        assert "2 runs: 1 finished before, 1 to do" in capsys.readouterr().out
        assert store.damaged() == []

    @pytest.mark.parametrize("run_id", ["0" * 16, "../../..", ""])
    def test_a_record_is_of_the_run_that_its_content_gives(self, store: RecordStore, run_id: str) -> None:
        first = store.run_ids()[0]
        record = store.load(first).model_copy(update={"run_id": run_id})
        (store.folder(first) / "record.json").write_text(record.to_json())
        assert store.read(first) is None
        assert store.skim(first) is None

    def test_records_from_before_there_were_checksums_are_read(self, store: RecordStore) -> None:
        run_id = store.run_ids()[0]
        record = store.load(run_id).model_copy(update={"schema_version": 1, "files": {}})
        path = store.folder(run_id) / "record.json"
        path.write_text(record.model_dump_json(exclude={"files"}))
        assert store.read(run_id) == record
        assert store.skim(run_id) is not None
        assert store.history(run_id)
        path.write_text(path.read_text().replace('"schema_version":1', '"schema_version":2'))
        assert store.read(run_id) is None, "without a checksum only the old version is believed"

    def test_what_is_no_run_is_no_record(self, store: RecordStore, capsys: pytest.CaptureFixture[str]) -> None:
        for name in (".DS_Store", "Thumbs.db", "0123456789ABCDEF", "notes"):
            (store.runs / name).write_text("")
        (store.runs / ".ipynb_checkpoints").mkdir()
        assert store.damaged() == []
        assert again(store) == 0
        assert "cannot be read" not in capsys.readouterr().out


class TestVersions:
    def test_a_newer_record_is_refused_and_left(self, store: RecordStore, capsys: pytest.CaptureFixture[str]) -> None:
        run_id = store.run_ids()[0]
        path = store.folder(run_id) / "record.json"
        make_newer(path)
        before, sweeps_before = path.read_bytes(), sorted(store.sweeps.iterdir())
        for options in ([], ["--seeds", "2"], ["--dry-run"]):
            capsys.readouterr()
            assert again(store, *options) == 2
            line = error_of(capsys)
            assert f"record of run '{run_id}'" in line
            assert "schema version 9, and this program reads up to 2" in line
        assert path.read_bytes() == before
        assert sorted(store.sweeps.iterdir()) == sweeps_before
        assert len(store.run_ids()) == 2, "nothing was run"
        assert main(["status", "--results", str(store.results)]) == 0
        assert main(["report", "--results", str(store.results)]) == 0
        output = capsys.readouterr()
        assert "schema version 9" in output.err
        assert "schema version 9" in " ".join(output.out.split())

    def test_an_unreadable_record_is_not_absent(self, store: RecordStore, capsys: pytest.CaptureFixture[str]) -> None:
        run_id = store.run_ids()[0]
        path = store.folder(run_id) / "record.json"
        path.unlink()
        (path / "within").mkdir(parents=True)
        assert again(store) == 2
        line = error_of(capsys)
        assert f"record of run '{run_id}'" in line
        assert "is there and cannot be read (Is a directory)" in line
        assert (path / "within").exists()
        assert main(["report", "--results", str(store.results)]) == 0

    def test_a_newer_sweep_is_refused_and_left(self, store: RecordStore, capsys: pytest.CaptureFixture[str]) -> None:
        (path,) = store.sweeps.iterdir()
        make_newer(path)
        before = path.read_bytes()
        for command in (["status"], COMMAND):
            assert main([*command, "--results", str(store.results)]) == 2
            assert "schema version 9" in error_of(capsys)
        assert path.read_bytes() == before

    def test_a_newer_checkpoint_is_refused_and_left(self, tmp_path: Path) -> None:
        checkpoint.save(tmp_path, 4, {"at": 4})
        path = tmp_path / "000000004" / "sums.json"
        make_newer(path)
        with pytest.raises(Unreadable, match="schema version 9"):
            checkpoint.load_newest(tmp_path)
        assert path.exists()


class TestSweeps:
    @pytest.mark.parametrize("damage", ["", "[", '{"a": 1}\n', "[" * 100_000, None])
    def test_a_garbled_one_is_passed_over(
        self, store: RecordStore, capsys: pytest.CaptureFixture[str], damage: str | None
    ) -> None:
        path = store.sweeps / "0123456789ab.jsonl"
        if damage is None:
            path.mkdir()
        else:
            path.write_text(damage)
        os.utime(path, (2e9, 2e9))  # the newest
        assert main(["status", "--results", str(store.results)]) == 0
        output = capsys.readouterr()
        assert "2 cells: 2 ended" in output.out
        assert output.err.startswith("passed over: ")
        assert "0123456789ab.jsonl" in output.err
        assert output.err.count("\n") == 1
        assert again(store) == 0

    def test_no_flipped_bit_is_believed(self, store: RecordStore) -> None:
        (path,) = store.sweeps.iterdir()
        whole = path.read_bytes()
        for place in range(len(whole)):
            flip(path, place)
            with pytest.raises((Damaged, Unreadable)):
                cells.cells(path)
            path.write_bytes(whole)
        assert len(cells.cells(path)) == 2


def smaller(state: dict[str, Any]) -> None:
    trained = state["adaptation"]["trained"]
    name = next(iter(trained))
    trained[name] = torch.zeros(1 + trained[name].numel())


def incomplete(state: dict[str, Any]) -> None:
    del state["seconds_total"]


def test_a_checkpoint_that_does_not_fit_gives_way(tmp_path: Path) -> None:
    """Whole by its checksums, of the right origin, and of other content."""
    store, whole = RecordStore(tmp_path / "results"), RecordStore(tmp_path / "whole")
    store.make_ready(), whole.make_ready()
    spec = spec_of(Subject("lora[rank=2]", tmp_path, batches=20, place=Place(checkpoint_every=4)))

    def interrupt(progress: Any) -> None:
        if progress.batches == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_one(spec, store, interrupt)
    folder = store.checkpoints / spec.run_id
    for path, change in zip(sorted(folder.iterdir()), (smaller, incomplete), strict=True):
        origin = json.loads((path / "origin.json").read_text())
        state = checkpoint.load_newest(folder, origin).state
        assert state is not None
        change(state)
        checkpoint.save(folder, int(path.name), state, origin)
    record = run_one(spec, store)
    assert record.status == "done", record.traceback
    assert record.notes == ("damaged checkpoint 000000008, 000000004 passed over: the run began anew",)
    assert record.result() == run_one(spec, whole).result()


def with_limit(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command where no file can grow above `size` bytes: what a full disk is, but for the error's number."""
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


class TestFullDisk:
    @pytest.mark.parametrize("size", [100, 1000, 2500])
    def test_is_one_line_and_no_record(self, tmp_path: Path, size: int) -> None:
        """Room for no claim, for that alone, and for predictions but no checkpoint."""
        what = ["--methods", "lora[rank=2]", "--tasks", "synthetic", "--batches", "8", "--executor", "serial"]
        keep = ["--checkpoint-every", "2", "--save-adapter", "--tracking-uri", "off"]
        done = with_limit(size, "run", *what, *keep, "--results", str(tmp_path / "results"))
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert "cannot be written (File too large)" in line
        store = RecordStore(tmp_path / "results")
        assert not store.run_ids()
        assert not list(store.running.iterdir())
        assert not list(tmp_path.rglob("*draft*"))
        assert main(["run", *what, "--results", str(store.results)]) == 0

    @pytest.mark.parametrize("saver", ["save_arrays", "save_tensors"])
    def test_in_any_saver_ends_the_run_without_a_record(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saver: str
    ) -> None:
        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(storage, saver, full)
        store = RecordStore(tmp_path / "results")
        store.make_ready()
        place = Place(checkpoint_every=2, save_adapter=True)
        with pytest.raises(Unwritable, match="No space left on device"):
            run_one(spec_of(Subject("head", tmp_path, batches=8, place=place)), store)
        assert not store.run_ids()
        assert not list(store.running.iterdir())

    def test_an_error_of_another_folder_is_the_runs_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(*args: object) -> None:
            (tmp_path / "elsewhere").read_text()

        monkeypatch.setattr("harness.method.Adaptation.export", missing)
        store = RecordStore(tmp_path / "results")
        store.make_ready()
        record = run_one(spec_of(Subject("head", tmp_path, place=Place(save_adapter=True))), store)
        assert record.status == "failed"
        assert record.error is not None
        assert record.error.startswith("FileNotFoundError")


def test_a_large_sweep_with_nothing_to_do_makes_no_report(
    store: RecordStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.commands.report.MOST_SHOWN", 1)
    monkeypatch.setattr("harness.commands.report.show_sweep", None)
    assert again(store) == 0
    output = capsys.readouterr().out
    assert "2 runs: 2 finished before, 0 to do" in output
    assert "2 runs are finished: 2 done; nothing was new" in output
    assert f"python -m harness report --results {store.results}" in output
