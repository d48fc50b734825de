"""What is handed on (export, card, tables, page, submission) names no place, host or user, and follows no link."""

from __future__ import annotations

import contextlib
import csv
import getpass
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from harness import cli
from harness.backbone import BackboneDtype
from harness.commands import target
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report import redact
from harness.report.build import build_report
from harness.report.forms.card import model_card
from harness.report.forms.data import csv_text
from harness.report.forms.page import page
from harness.report.redact import cut, handed_on, last_part, model_name, plain_text
from harness.spec import Place, TrainSpec
from tests.support import tiny
from tests.support.report_records import ENVIRONMENT, board, boards, record, stored

ROOT = Path(__file__).parents[2]
HOST, USER = "gpu-node-17", "zaphod"
SECRET = (HOST, USER, "/home/", "/srv/", "C:\\", "My Disk")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host and a user whose names occur nowhere else, not in the name of the test's folder either."""
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.cluster.example")
    monkeypatch.setattr(getpass, "getuser", lambda: USER)
    redact.this_machine.cache_clear()


def telling(score: float | None = 0.5, **changes: Any) -> RunRecord:
    """A record with places, host and user wherever one can stand."""
    trace = f'Traceback:\n  File "/home/{USER}/venv/lib/python3.11/site-packages/torch/x.py", line 3\n{HOST}: killed'
    values: dict[str, Any] = {
        "place": Place(
            data_root="/srv/My Disk/hub", model=f"/home/{USER}/models/minilm", path=f"/srv/{USER}/rows.csv",
            save_adapter=True, forgetting=f"/srv/My Disk/{USER}'s texts/a text.txt",
        ),
        "method_parameters": {"marks": f"/home/{USER}/marks", "deep": [{"at": "C:\\Users\\zaphod\\x"}]},
        "task_parameters": {"file": f"/srv/data/{USER}"},
        "environment": ENVIRONMENT.model_copy(
            update={"platform": f"Linux-6.1-{HOST}", "packages": {"torch": f"2.0 @ file:///home/{USER}/torch"}}
        ),
        "notes": (f"taken up again on {HOST} by {USER}@{HOST}:/srv/x",),
        "error": "FileNotFoundError: '/srv/My Disk/hub/org/data/x.parquet' is not readable on " + HOST,
        "traceback": trace,
        "data": {"train": {"from": f"/home/{USER}/rows.csv"}},
        "ranks": {f"/home/{USER}/layer": 3},
    }  # fmt: skip
    return record("lora", score=score, **(values | changes))


def no_secret(data: bytes, *others: str) -> None:
    for secret in (*SECRET, *others):
        assert secret.encode() not in data, secret


KEPT = [
    "org/model", "glue/mnli", "mnli/matched", "1/2 of 3/4/5", "lora[rank=4] on glue/mnli", "samples/s", "n/a",
    "https://huggingface.co/org/model/tree/main", "s3://bucket/a/b", "hf://org/model/x", "./a/b", "../a/b", "a/b/c",
    "recall@k is 0.5", "peft@0.19.1", "about ~5 %", "text/plain; a/b", "x = a / b / c", ".*\\.query\\.(a|b)", "/", "//",
    "^bert\\.encoder\\.layer", "2024/01/02", "and/or", "", "bert-base-uncased", "10 it/s", "a\nb",
]  # fmt: skip
CUT = {
    "[Errno 2] No such file: '/data/My Docs/x.csv'": "[Errno 2] No such file: 'x.csv'",
    "/data/a/b.py:12": "b.py:12",
    "at /opt/x/lib/python3.11/site-packages/torch/nn/x.py, line 3": "at torch/nn/x.py, line 3",
    "faulty[marks=/data/a/x]": "faulty[marks=x]",
    "text:/data/a/x.csv": "text:x.csv",
    "file:///data/a/x": "file:x",
    "sqlite:////data/a/x.db": "sqlite:x.db",
    "https://me:token@h.example/a/b": "https://h.example/a/b",
    "C:\\Users\\ann\\x.txt is gone": "x.txt is gone",
    "'D:\\\\data\\\\x y\\\\z.txt'": "'z.txt'",
    "C:/data/x": "x",
    "\\\\server\\share\\x": "x",
    "~ann/models/x": "x",
    "~/models/x": "x",
    "'~'": "'~'",
    "/home/ann": "~",
    "[/home/ann]": "[~]",
    "-I/home/ann/include": "-Iinclude",
    "PATH=/usr/bin:/opt/a/b": "PATH=bin:b",
    "said:\\n/data/a/b": "said:\\nb",
    "\x1b[31m/data/a/b\x1b[0m": "b",
    "ann@node7:/data/x": "someone:x",
    "mail ann@uni.example": "mail someone",
    "/home/ann/x of ann, not of anna": "x of someone, not of anna",
    f"{HOST} and {HOST.upper()}.cluster.example and x{HOST}": f"someone and someone and x{HOST}",
}


class TestText:
    @pytest.mark.parametrize("text", KEPT)
    def test_kept(self, text: str) -> None:
        assert cut(text) == text
        assert plain_text(text) == text

    @pytest.mark.parametrize("text", CUT)
    def test_cut(self, text: str) -> None:
        assert plain_text(text) == CUT[text]
        assert plain_text(CUT[text]) == CUT[text]

    @pytest.mark.parametrize(
        "around", ["{}", "'{}'", '"{}"', "at {}, line 3", "({})", "[{}]", "a={}", "a:{}", "\n{}\n"]
    )
    @pytest.mark.parametrize(
        "root", ["/data", "/home", "/Users", "C:\\Users", "/root/.cache", "//mnt/x", "~", "/mnt/é ü"]
    )
    @pytest.mark.parametrize("rest", ["quokka/x", "a/quokka/x.py", "quokka//a/b/", "quokka/[b]/c"])
    def test_nothing_of_a_path_but_its_end(self, around: str, root: str, rest: str) -> None:
        if " " in root and around not in ("'{}'", '"{}"'):
            pytest.skip("a path with a space ends at it unless it is quoted")
        sign = "\\" if "\\" in root else "/"
        made = plain_text(around.format(f"{root}{sign}{rest.replace('/', sign)}"))
        assert "quokka" not in made
        assert root not in made or root == "~"

    @pytest.mark.parametrize(
        "piece", ["x", "/a", "/", "a.", "a@", "~", "\\", "'/a", "a:/", "a://b", "/home/", "a-", "x "]
    )
    def test_the_work_grows_with_the_text(self, piece: str) -> None:
        plain_text(piece * (200_000 // len(piece)))  # takes hours where it grows with the square

    def test_values(self) -> None:
        assert cut({"a": ["/data/x/y", 3, None, True, {"/data/x/z": "/data/x/z"}]}) == {
            "a": ["y", 3, None, True, {"z": "z"}]
        }
        assert cut({"/a/b/x": 1, "/c/d/x": 2}) == {"x": 1, "x'": 2}

    @pytest.mark.parametrize(
        ("model", "name"),
        [("org/model", "org/model"), ("bert", "bert"), (None, None), ("/data/My Disk/minilm/", "minilm"),
         ("/minilm", "minilm"), ("C:\\models\\minilm", "minilm"), ("/home/ann", "~"), ("/srv/zaphod", "someone")],
    )  # fmt: skip
    def test_model_name(self, model: str | None, name: str | None) -> None:
        assert model_name(model) == name

    def test_last_part(self) -> None:
        assert [last_part(path) for path in ("/a/b/", "/home/ann", "~ann", "b", "/a/site-packages/p/q.py")] == [
            "b", "~", "~", "b", "p/q.py",
        ]  # fmt: skip


class TestRecord:
    def test_of_a_run_without_places_nothing_changes(self) -> None:
        plain = record(ranks={"bert.layer|0`": 3}, place=Place(model="org/model"), error="lr 1e-3/2 is odd")
        assert handed_on(plain) == plain

    def test_it_says_nothing_and_stays_a_record(self) -> None:
        made = handed_on(telling())
        no_secret(made.model_dump_json().encode())
        assert RunRecord.model_validate_json(made.model_dump_json()) == made
        assert made.environment.platform == "Linux"
        assert made.environment.processor == ENVIRONMENT.processor
        assert made.spec.place == Place(model="minilm", path="rows.csv", save_adapter=True, forgetting="a text.txt")
        assert made.traceback is not None
        assert 'File "torch/x.py", line 3' in made.traceback
        assert made.error == "FileNotFoundError: 'hub/org/data/x.parquet' is not readable on someone"

    def test_its_run_id_is_that_of_its_spec(self) -> None:
        changed = telling()
        plain = telling(method_parameters={"rank": 8}, task_parameters={})
        assert handed_on(plain).run_id == plain.run_id == handed_on(plain).spec.run_id
        made = handed_on(changed)
        assert made.run_id == made.spec.run_id != changed.run_id
        assert changed.run_id in made.notes[-1]

    def test_twice_is_once(self) -> None:
        made = handed_on(telling())
        assert handed_on(made) == made


def exported(tmp_path: Path, run: RunRecord, files: dict[str, bytes]) -> Path:
    store = stored(tmp_path / "results")
    draft = store.draft(run.run_id)
    for name, content in files.items():
        (draft / "adapter" / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / "adapter" / name).write_bytes(content)
    store.write(run, [], draft)
    return store.results


def tensors(folder: Path, metadata: dict[str, str]) -> bytes:
    save_file({"a": np.arange(6.0).reshape(2, 3)}, folder / "x.safetensors", metadata)
    return (folder / "x.safetensors").read_bytes()


class TestExport:
    def test_no_byte_of_it_tells(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = telling()
        config = {"base_model_name_or_path": f"/home/{USER}/models/My Disk", "r": 8, "auto_mapping": None}
        model = tensors(tmp_path, {"from": f"/home/{USER}/x", "format": "pt"})
        plain = tensors(tmp_path, {"format": "pt"})
        files = {
            "adapter_config.json": json.dumps(config | {"base_model_name_or_path": f"/home/{USER}/minilm"}).encode(),
            "adapter_model.safetensors": model,
            "more/plain.safetensors": plain,
            "more/notes.md": f"base_model: /home/{USER}/models/minilm".encode(),
            "plain.json": b'{"b": 1,\n "a": 2}',
            "plain.bin": b"\x00\xff" * 9,
            "README.md": b"PEFT's own card of /home/zaphod/models/minilm",
        }
        to = tmp_path / "to"
        results = exported(tmp_path, run, files)
        assert cli.main(["export", run.run_id, "--to", str(to), "--results", str(results)]) == 0
        made = {path.relative_to(to).as_posix(): path.read_bytes() for path in to.rglob("*") if path.is_file()}
        assert set(made) == {*files, "record.json"}
        for content in made.values():
            no_secret(content, str(tmp_path))
        assert json.loads(made["adapter_config.json"])["base_model_name_or_path"] == "minilm"
        for name in ("plain.json", "plain.bin", "more/plain.safetensors"):
            assert made[name] == files[name]
        (header,) = struct.unpack("<Q", made["adapter_model.safetensors"][:8])
        assert header % 8 == 0
        assert load_file(to / "adapter_model.safetensors")["a"].tolist() == np.arange(6.0).reshape(2, 3).tolist()
        kept = RunRecord.model_validate_json(made["record.json"])
        assert kept.result() == handed_on(run).result()
        assert kept.error == handed_on(run).error

    @pytest.mark.parametrize("kind", ["file", "folder", "whole", "fifo", "deep"])
    def test_links_are_not_followed(self, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
        run = record()
        results = exported(tmp_path, run, {"adapter_config.json": b"{}", "a/b": b"x"})
        adapter = RecordStore(results).folder(run.run_id) / "adapter"
        secret = tmp_path / "secret"
        secret.mkdir()
        (secret / "passwd").write_text("hidden")
        odd = adapter / "a" / "odd" if kind == "deep" else adapter / "odd"
        if kind == "whole":
            adapter.rename(tmp_path / "moved")
            (odd := adapter).symlink_to(tmp_path / "moved")
        elif kind == "fifo":
            os.mkfifo(odd)
        else:
            odd.symlink_to(secret if kind == "folder" else secret / "passwd")
        assert cli.main(["export", run.run_id, "--to", str(tmp_path / "to"), "--results", str(results)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert str(odd) in told
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            ["results", "secret", *(["moved"] if kind == "whole" else [])]
        )

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.json", b"{", "is damaged"),
            ("x.json", b"[" * 100_000, "is damaged"),
            ("x.json", b"\xff\xfe", "is damaged"),
            ("x.safetensors", b"short", "is damaged"),
            ("x.safetensors", struct.pack("<Q", 2**60) + b"{}", "is damaged"),
            ("x.safetensors", struct.pack("<Q", 2) + b"[]", "is damaged"),
            ("x.pt", b"\x80\x02/home/zaphod/models", "holds a path of this machine"),
        ],
    )
    def test_what_cannot_be_handed_on(
        self, tmp_path: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = record()
        results = exported(tmp_path, run, {"adapter_config.json": b"{}", name: content})
        assert cli.main(["export", run.run_id, "--to", str(tmp_path / "to"), "--results", str(results)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert message in told
        assert name in told
        assert [path.name for path in tmp_path.iterdir()] == ["results"]

    def test_real_adapters(self, tmp_path: Path) -> None:
        place = tmp_path / "home" / USER
        tiny.write_bert(place / "bert")
        tiny.write_data_root(place / "data")
        results = place / "results"
        options = ["--tasks", "glue/rte", "--batches", "2", "--model", str(place / "bert"), "--save-adapter"]
        options += ["--data-root", str(place / "data"), "--results", str(results), "--executor", "serial"]
        methods = "head,lora,hadapter,debora,bitfit,sara,peft[type=ia3]"
        assert cli.main(["run", "--methods", methods, *options]) == 0
        records = RecordStore(results).records()
        assert len(records) == 7
        for run in records:
            to = tmp_path / "out" / run.run_id
            assert cli.main(["export", run.run_id, "--to", str(to), "--results", str(results)]) == 0
            for path in to.rglob("*.*"):
                no_secret(path.read_bytes(), str(tmp_path))
        for path in results.rglob("*.*"):
            if path.parent.name in ("tables", "pictures") or path.name == "report.html":
                no_secret(path.read_bytes(), str(tmp_path))


def test_the_packed_study_tells_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "study"
    script = ROOT / "scripts" / "pack.py"
    stores = [stored(folder / part, telling()) for part in ("main", "parts", "convolutions")]
    (folder / "main" / "parents.json").write_text("{}")

    def pack() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})

    assert pack().returncode == 0
    with tarfile.open(folder / "records.tar.xz") as archive:
        assert len(archive.getnames()) == 4
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None
            assert not [secret for secret in ("/home/", "/srv/", "C:\\") if secret.encode() in content.read()]
    (stores[0].folder(telling().run_id) / "predictions.safetensors").symlink_to(script)
    refused = pack()
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "is a link" in refused.stderr


TARGETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "": (lambda folder: None, "is no path"),
    "file": (lambda folder: (folder / "file").write_text("x"), "is there already"),
    "folder": (lambda folder: (folder / "folder").mkdir(), "is there already"),
    "link": (lambda folder: (folder / "link").symlink_to("nowhere"), "is there already"),
    "file/below": (lambda folder: (folder / "file").write_text("x"), "is not a folder"),
    "a\nb": (lambda folder: None, "cannot be shown"),
    "a\x1b[31m": (lambda folder: None, "cannot be shown"),
    "x" * 300: (lambda folder: None, "longer than a path can be"),
    "y/..": (lambda folder: None, "is no name"),
}


class TestTarget:
    @pytest.mark.parametrize(
        ("name", "to"),
        [(name, to) for name in ("export", "export-glue") for to in TARGETS if (name, to) != ("export-glue", "file")],
    )
    def test_it_must_be_new(
        self, tmp_path: Path, name: str, to: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = record(task="glue/cola")
        results = exported(tmp_path, run, {"adapter_config.json": b"{}"})
        (folder := tmp_path / "here").mkdir()
        monkeypatch.chdir(folder)
        make, message = TARGETS[to]
        make(folder)
        before = sorted(folder.rglob("*"))
        with contextlib.suppress(SystemExit):  # of the options' own checks
            assert cli.main([name, run.run_id, "--to", to, "--results", str(results)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "\x1b" not in told
        assert message in told
        assert sorted(folder.rglob("*")) == before

    def test_a_file_is_replaced_by_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "glue.zip").write_text("of before")
        with target.made(tmp_path / "glue.zip", replaces=True) as draft:
            assert (tmp_path / "glue.zip").read_text() == "of before"
            draft.write_text("new")
        assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]

    def test_below_a_linked_folder(self, tmp_path: Path) -> None:
        run = record()
        results = exported(tmp_path, run, {"adapter_config.json": b"{}"})
        (tmp_path / "disk").mkdir()
        (tmp_path / "link").symlink_to("disk")
        to = tmp_path / "link" / "new" / "x"
        assert cli.main(["export", run.run_id, "--to", str(to), "--results", str(results)]) == 0
        assert (tmp_path / "disk" / "new" / "x" / "record.json").is_file()

    def test_a_full_disk_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = record()
        results = exported(tmp_path, run, {"adapter_config.json": b"{}"})

        def full(self: Path, *args: object, **more: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        assert cli.main(["export", run.run_id, "--to", str(tmp_path / "to"), "--results", str(results)]) == 2
        assert "cannot be written (No space left on device)" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["results"]


class TestReport:
    def test_no_table_and_no_page_tells(self, tmp_path: Path) -> None:
        failed = telling(None, seed=1)
        other = telling(method_parameters={"marks": "/srv/other/marks"})
        paths = build_report(stored(tmp_path / "results", telling(), failed, other))
        assert len(paths) > 5
        for path in paths:
            no_secret(path.read_bytes(), str(tmp_path))
        text = (tmp_path / "results" / "tables" / "leaderboard.md").read_text(encoding="utf-8")
        assert "lora\\[marks" not in text
        assert "marks=marks" in text
        assert "'hub/org/data/x.parquet' is not readable on someone" in text

    def test_a_reason_of_damage_tells_no_place(self) -> None:
        reasons = ["0123456789abcdef (the record in '/srv/My Disk/results' cannot be read)"]
        no_secret(page([board(record())], reasons, {}, {}).encode())

    def test_a_linked_picture_is_left_out(self, tmp_path: Path) -> None:
        one = board(record())
        (tmp_path / "secret").write_bytes(b"hidden")
        (tmp_path / "rank_curves.png").symlink_to("secret")
        (tmp_path / "over_time.png").write_bytes(b"shown")
        pictures = [("Linked", tmp_path / "rank_curves.png"), ("What methods report", tmp_path / "over_time.png")]
        text = page([one], [], {}, {one.key: pictures})
        assert text.count("data:image/png") == 1
        assert "What methods report" in text
        assert "Linked" not in text


class TestCsv:
    @pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\uff1d1"])
    def test_text_is_no_formula(self, text: str) -> None:
        (row,) = csv.DictReader(io.StringIO(csv_text(pd.DataFrame({"a": [text], "b": [1]})), newline=""))
        assert row == {"a": f"'{text}", "b": "1"}
        heading = next(csv.reader(io.StringIO(csv_text(pd.DataFrame({text: [1]})), newline="")))
        assert heading == [f"'{text}"]

    def test_everything_else_is_as_pandas_writes_it(self) -> None:
        columns = {
            "numbers": [-0.5, 1.0, float("nan")],
            "whole": [-1, 0, 1],
            "mixed": [-3, 0.1, None],
            "flags": [True, False, True],
            "texts": ["a=b", "lora[rank=4], x", 'say "no"'],
            "as text": ["-0.5", "+1e3", ""],
        }
        table = pd.DataFrame({name: pd.Series(values) for name, values in columns.items()})
        for each in (table, table.astype(object), table.iloc[:0]):
            assert csv_text(each) == each.to_csv(index=False, lineterminator="\n")

    def test_of_a_foreign_label(self, tmp_path: Path) -> None:
        build_report(stored(tmp_path, record('=HYPERLINK("http://x")'), record(task="@text:cmd")))
        for path in (tmp_path / "tables").glob("*.csv"):
            for row in csv.reader(io.StringIO(path.read_text())):
                assert not [cell for cell in row if cell.startswith(("=", "@"))]


class TestCard:
    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            (["adapter_config.json"], "PeftModel.from_pretrained"),
            (["mine.json"], "from package.mine import put\n\nmodel = put(model,"),
            (["mine.json", "trained.safetensors"], "from package.mine import put\n\nmodel = put(model,"),
            (["trained.safetensors"], "model.load_state_dict("),
            (["other.json"], "the package that has the method was not there"),
        ],
    )
    def test_it_says_how_the_export_is_loaded(self, files: list[str], expected: str) -> None:
        run = record()
        ways = ("PeftModel.from_pretrained", "model = put(model,", "model.load_state_dict(", "was not there")
        card = model_card(run, boards(run), files, "ours: x", {"mine.json": "package.mine.put"})
        assert expected in card
        assert len([way for way in ways if way in card]) == 1

    @pytest.mark.parametrize("dtype", ["fp32", "nf4"])
    def test_it_says_what_the_backbone_was_held_in(self, dtype: BackboneDtype) -> None:
        run = record(train=TrainSpec(batches=100, backbone_dtype=dtype))
        card = model_card(run, boards(run), ["adapter_config.json"], "ours: x")
        assert ("held in nf4 while" in card) == (dtype == "nf4")

    def test_odd_names_are_neither_yaml_nor_markdown(self) -> None:
        odd = 'x"\nbase_model: evil/model\n---\n# <b>`|[a](http://x)'
        run = record(odd, ranks={"a|b`c\n| d | 9 |": 3}, method_parameters={"text": "```\n# no"}, rows={"|\n#": 3},
                     headline="f|1\n#", others={"m|\n## x": 0.5})  # fmt: skip
        card = model_card(run, boards(run), ["adapter_config.json"], "ours: x")
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front) == {"library_name": "peft", "tags": [" ".join(odd.split())]}
        lines = body.splitlines()
        titles = [line for line in lines if line.startswith("#") and line != "# no"]
        assert len([line for line in titles if line.startswith("# ")]) == 1
        assert [line for line in lines if "d \\| 9" in line] == ["| `a\\|b'c \\| d \\| 9 \\|` | 3 |"]
        fence = next(line for line in lines if line.endswith("json"))
        assert fence == "````json"
        assert lines[1].endswith("\\<b\\>\\`\\|[a]\\(http://x) on digits")

    @pytest.mark.parametrize(
        ("model", "base"),
        [("org/model", "org/model"), ("../x", None), ("./x", None), ("/home/ann/x", None), ("C:\\a/b", None),
         ("a/b/c", None), ("minilm", None), ("~ann/x", None), ("o/m\nx: y", None)],
    )  # fmt: skip
    def test_base_model_is_a_hub_id(self, model: str, base: str | None) -> None:
        run = record(place=Place(model=model))
        front = model_card(run, boards(run), [], "ours: x").split("---\n")[1]
        assert yaml.safe_load(front).get("base_model") == base

    def test_very_long_texts(self) -> None:
        run = record(ranks={"x" * 10**6: 1}, error="/a" * 10**5, method_parameters={"t": "y/" * 10**5})
        assert len(model_card(run, boards(run), [], "ours: x")) > 10**6


class TestDiff:
    def test_a_line_for_each_difference(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        deep: Any = 1
        for _ in range(100):
            deep = {"a": deep}
        one = record(notes=("a\nb\x1b[31m",), ranks={"q\n\x07": 1, "l" * 10**5: 2}, data={"train": {"x": deep}})
        two = record(seed=1, notes=(), error="e\n" * 9)
        store = stored(tmp_path, one, two)
        assert cli.main(["diff", one.run_id, two.run_id, "--results", str(store.results)]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\x07" not in out
        assert "ranks.q" in out
        assert max(map(len, out.splitlines())) < 320


class TestSubmission:
    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"test/predictions": np.zeros((2, 3), np.int64)}, "of shape (2, 3)"),
            ({"test/predictions": np.zeros(3, bool)}, "is bool"),
            ({"test/predictions": np.zeros((), np.int64)}, "of shape ()"),
            ({"other/predictions": np.zeros(3, np.int64)}, "needs 'test'"),
            ({"test/predictions": np.zeros(3, np.int64)}, "would have 3 rows"),
            ({"test/predictions": np.full(1063, 2)}, "the prediction 2 is not a class from 0 to 1"),
            ({"test/predictions": np.full(1063, -1)}, "the prediction -1 is not"),
            ({"test/predictions": np.zeros(1063)}, "are float64, not numbers of classes"),
            ({"test": np.zeros(3)}, "kept no predictions for the test set"),
            (b"no tensors", "are damaged"),
            (struct.pack("<Q", 76) + b'{"test/predictions":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}      '
             + b"1234", "are damaged"),
        ],
    )  # fmt: skip
    def test_odd_predictions(
        self, tmp_path: Path, arrays: Any, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = self.submitted(tmp_path, "glue/cola", arrays, capsys)
        assert message in told
        assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]

    def test_no_number(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arrays = {"test/predictions": np.full(1379, np.nan)}
        assert "the prediction nan is not a finite number" in self.submitted(tmp_path, "glue/stsb", arrays, capsys)

    def submitted(self, tmp_path: Path, task: str, arrays: Any, capsys: pytest.CaptureFixture[str]) -> str:
        run = record(task=task)
        store = stored(tmp_path / "results")
        draft = store.draft(run.run_id)
        if isinstance(arrays, bytes):
            (draft / "predictions.safetensors").write_bytes(arrays)
        else:
            save_file(arrays, draft / "predictions.safetensors")
        store.write(run, [], draft)
        arguments = [run.run_id, "--to", str(tmp_path / "x.zip"), "--results", str(store.results)]
        assert cli.main(["export-glue", *arguments]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    def test_the_zip_tells_nothing(self, tmp_path: Path) -> None:
        run = telling(task="glue/cola")
        store = stored(tmp_path / USER)
        draft = store.draft(run.run_id)
        save_file({"test/predictions": np.zeros(1063, np.int64)}, draft / "predictions.safetensors")
        store.write(run, [], draft)
        to = tmp_path / "new" / "x.zip"
        assert cli.main(["export-glue", run.run_id, "--to", str(to), "--results", str(store.results)]) == 0
        no_secret(to.read_bytes(), str(tmp_path))
        with zipfile.ZipFile(to) as archive:
            for entry in archive.infolist():
                assert entry.date_time == (1980, 1, 1, 0, 0, 0)
                assert entry.extra == b""
                no_secret(archive.read(entry))

    def test_linked_predictions(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = record(task="glue/cola")
        store = stored(tmp_path / "results", run)
        save_file({"test/predictions": np.zeros(1063, np.int64)}, tmp_path / "elsewhere")
        (store.folder(run.run_id) / "predictions.safetensors").symlink_to(tmp_path / "elsewhere")
        arguments = [run.run_id, "--to", str(tmp_path / "x.zip"), "--results", str(store.results)]
        assert cli.main(["export-glue", *arguments]) == 2
        assert "is no plain file" in capsys.readouterr().err
