"""The cache of tokenised and decoded data: made once, keyed by content, safe under concurrent writers."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tasks.cache import cached
from tests.support import tiny


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Counts how often something is made."""

    def __init__(self, value: int = 1) -> None:
        self.value, self.made = value, 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.made += 1
        return {"a": np.full((3, 2), self.value), "b": np.array([True, False])}


def test_made_once_and_again_for_another_key(folder):
    make = Maker()
    one, two = (cached("texts", ("model", 8), ("numpy",), make) for _ in range(2))
    assert make.made == 1
    assert one.keys() == two.keys() == {"a", "b"}
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
        assert one[name].dtype == two[name].dtype
    for kind, made_from in (("texts", ("model", 9)), ("texts", ("other", 8)), ("pairs", ("model", 8))):
        cached(kind, made_from, ("numpy",), make)
    assert make.made == 4
    assert len(list(folder.iterdir())) == 4


def test_another_version_of_a_library_is_another_key(folder, monkeypatch):
    make = Maker()
    for installed in ("1.0", "2.0"):
        monkeypatch.setattr("tasks.cache.version", lambda name, installed=installed: installed)
        cached("texts", ("model",), ("numpy",), make)
    assert make.made == 2


def rewritten(entry: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """The entry with other arrays under its own metadata."""
    with safe_open(entry, "numpy") as file:
        metadata = file.metadata()
    save_file(change(load_file(entry)), entry, metadata)


def instead(entry: Path, make: Callable[[Path], object]) -> None:
    """Something else in the entry's place."""
    entry.unlink()
    make(entry)


def another_entry(entry: Path) -> None:
    cached("texts", ("another model",), ("numpy",), Maker(2))
    (other,) = (path for path in entry.parent.iterdir() if path != entry)
    shutil.move(other, entry)


def link_to_a_whole_entry(entry: Path) -> None:
    entry.symlink_to(shutil.move(entry, entry.parent.parent / "elsewhere"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "emptied": lambda entry: entry.write_bytes(b""),
    "a header alone": lambda entry: entry.write_bytes(b"\x08\x00"),
    "cut off": lambda entry: entry.write_bytes(entry.read_bytes()[:-5]),
    "longer": lambda entry: entry.write_bytes(entry.read_bytes() + b"\x00"),
    "zeroed": lambda entry: entry.write_bytes(bytes(entry.stat().st_size)),
    "a huge header": lambda entry: entry.write_bytes(b"\xff" * 7 + b"\x7f" + entry.read_bytes()[8:]),
    "zeroed numbers": lambda entry: rewritten(entry, lambda found: {k: np.zeros_like(v) for k, v in found.items()}),
    "other names": lambda entry: rewritten(entry, lambda found: {f"{k}s": v for k, v in found.items()}),
    "one less": lambda entry: rewritten(entry, lambda found: {"a": found["a"]}),
    "one more": lambda entry: rewritten(entry, lambda found: {**found, "c": found["a"]}),
    "another type": lambda entry: rewritten(entry, lambda found: {**found, "a": found["a"].view(np.uint64)}),
    "another shape": lambda entry: rewritten(entry, lambda found: {**found, "a": found["a"].reshape(2, 3)}),
    "no checksum": lambda entry: save_file(load_file(entry), entry),  # as entries were
    "another entry": another_entry,
    "a link": link_to_a_whole_entry,
    "a broken link": lambda entry: instead(entry, lambda path: path.symlink_to("nowhere")),
    "a pipe": lambda entry: instead(entry, os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_an_entry_that_is_not_what_was_written_is_made_again(folder, damage):
    make = Maker()
    cached("texts", ("model",), ("numpy",), make)
    (entry,) = folder.iterdir()
    damage(entry)
    for _ in range(2):  # and what was made is the entry from then on
        found = cached("texts", ("model",), ("numpy",), make)
        assert {name: (array.dtype, array.tolist()) for name, array in found.items()} == {
            "a": (np.int64, [[1, 1]] * 3),
            "b": (np.bool_, [True, False]),
        }
        assert make.made == 2
    assert [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()] == [entry]


def test_no_flipped_bit_is_believed(folder):
    make = Maker()
    cached("texts", ("model",), ("numpy",), make)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    flips = range(0, 8 * len(whole), 31)
    for bit in flips:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        entry.write_bytes(flipped)
        assert cached("texts", ("model",), ("numpy",), make)["a"].tolist() == [[1, 1]] * 3, bit
    assert make.made == 1 + len(flips)


def test_a_folder_in_the_way_of_an_entry_keeps_nothing_and_stops_nothing(folder):
    make = Maker()
    cached("texts", ("model",), ("numpy",), make)
    (entry,) = folder.iterdir()
    entry.unlink()
    (entry / "more").mkdir(parents=True)
    assert all(cached("texts", ("model",), ("numpy",), make)["a"].sum() == 6 for _ in range(2))
    assert make.made == 3
    assert [path.name for path in folder.iterdir()] == [entry.name]


def test_a_full_disk_keeps_nothing_and_stops_nothing(folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # bytes of a file: less than an entry has
    try:
        assert cached("texts", ("model",), ("numpy",), Maker())["a"].sum() == 6
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == []


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", "~nobody-of-this-name/cache")
    assert cached("texts", ("model",), ("numpy",), Maker())["a"].sum() == 6


def test_nothing_is_kept_where_the_folder_cannot_be_written_or_none_is_wanted(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    for place in (str(tmp_path / "file"), ""):
        monkeypatch.setenv("HARNESS_CACHE", place)
        make = Maker()
        assert all(cached("texts", ("model",), ("numpy",), make)["a"].sum() == 6 for _ in range(2))
        assert make.made == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _write_often(value: int) -> bool:
    """Every entry that is read is whole: all of one writer's numbers."""
    found = []
    for round_ in range(30):
        arrays = cached("texts", ("model", round_ % 3), (), lambda: {"a": np.full(50_000, value)})
        found.append(len(np.unique(arrays["a"])) == 1 and len(arrays["a"]) == 50_000)
    return all(found)


def test_concurrent_writers_leave_whole_entries(folder):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_write_often, range(8)) == [True] * 8
    assert len(list(folder.iterdir())) == 3  # and no drafts


def test_poisoned_entries_change_no_encoding(folder, tmp_path):
    """Tokens and pixels with one bit flipped in each, with zeros, under other names."""
    from tasks.cifar10 import Cifar10
    from tasks.glue import Glue

    data, model = str(tiny.write_data_root(tmp_path / "data")), str(tiny.write_bert(tmp_path / "bert"))
    task = Glue.of({"member": "rte"}, owner="glue/rte")

    def encoded() -> list[np.ndarray]:
        texts, images = task.encode(task.load(data)[0], model), Cifar10().load(data)[0]
        return [*texts.tokens.values(), texts.starts, texts.cut, np.asarray(images.columns["image"])]

    true = encoded()
    for change in (
        lambda found: {name: array ^ array.dtype.type(1) for name, array in found.items()},
        lambda found: {name: np.zeros_like(array) for name, array in found.items()},
        lambda found: {f"no {name}": array for name, array in found.items()},
    ):
        for entry in folder.iterdir():
            rewritten(entry, change)
        for array, again in zip(true, encoded(), strict=True):
            np.testing.assert_array_equal(array, again)


def test_texts_and_images_are_encoded_once(folder, tmp_path, monkeypatch):
    from tasks import text
    from tasks.cifar10 import Cifar10
    from tasks.glue import Glue
    from tasks.hub import Rows

    tiny.write_data_root(tmp_path / "data")
    task = Glue.of({"member": "rte"}, owner="glue/rte")
    train, _ = task.load(str(tmp_path / "data"))
    model = str(tiny.write_bert(tmp_path / "bert"))
    first = task.encode(train, model)
    images, _ = Cifar10().load(str(tmp_path / "data"))
    monkeypatch.setattr(text, "tokenized", lambda *args: pytest.fail("tokenised again"))
    monkeypatch.setattr(Rows, "_decoded", lambda *args: pytest.fail("decoded again"))
    second = task.encode(train, model)
    for name, tokens in first.tokens.items():
        np.testing.assert_array_equal(tokens, second.tokens[name])
    assert first.padding == second.padding
    np.testing.assert_array_equal(images.columns["image"], Cifar10().load(str(tmp_path / "data"))[0].columns["image"])
    other = str(tiny.write_bert(tmp_path / "other", seed=1))
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        task.encode(train, other)
