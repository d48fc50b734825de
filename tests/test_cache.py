"""The cache of tokenised and decoded data: made once, keyed by content, safe under concurrent writers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from tasks.cache import cached
from tests import tiny


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


@pytest.mark.parametrize("damage", [b"", b"\x08\x00", None])
def test_a_damaged_entry_is_made_again(folder, damage):
    make = Maker()
    cached("texts", ("model",), ("numpy",), make)
    (entry,) = folder.iterdir()
    entry.write_bytes(entry.read_bytes()[:-5] if damage is None else damage)
    assert cached("texts", ("model",), ("numpy",), make)["a"].sum() == 6
    assert make.made == 2
    cached("texts", ("model",), ("numpy",), make)
    assert make.made == 2


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
