"""How far seeds agree on ranks, against chance: a slow reference, what may be dealt, and where the table stands."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness import cli
from harness.record.record import RunRecord
from harness.report.tables.rank_agreement import (
    agreement,
    agreement_table,
    agreements,
    module_of,
    shared,
)
from tests.support.report_records import board, record, stored

Ranks = Mapping[str, int]
LAYERS = [f"encoder.layer.{block}.{module}" for block in range(6) for module in ("query", "dense")]
SHAPES = {layer: (8, 8) if layer.endswith("query") else (8, 32) for layer in LAYERS}


def everywhere(layer: str) -> str:
    return "any"


def slow_share(runs: list[Ranks]) -> float:
    """By the words of the definition."""
    shares = []
    for place, first in enumerate(runs):
        for second in runs[:place]:
            both = sum(min(first[layer], second[layer]) for layer in first)
            shares.append(both / ((sum(first.values()) + sum(second.values())) / 2))
    return statistics.fmean(shares)


def slow_chance(runs: list[Ranks], kinds: Mapping[str, object], draws: int) -> tuple[float, float, float]:
    """(mean, low, high) of shares of ranks dealt anew within kinds."""
    dice, shares = random.Random(4), []
    for _ in range(draws):
        dealt = []
        for run in runs:
            made: dict[str, int] = {}
            for kind in set(kinds.values()):
                layers = [layer for layer in run if kinds[layer] == kind]
                ranks = [run[layer] for layer in layers]
                dice.shuffle(ranks)
                made |= dict(zip(layers, ranks, strict=True))
            dealt.append({layer: made[layer] for layer in run})
        shares.append(slow_share(dealt))
    cuts = statistics.quantiles(shares, n=40)
    return statistics.fmean(shares), cuts[0], cuts[-1]


def some_ranks(seed: int) -> dict[str, int]:
    dice = random.Random(seed)
    return {layer: dice.choice([0, 0, 1, 2, 8]) for layer in LAYERS}


def ranked(seed: int, ranks: Ranks, shapes: Mapping[str, tuple[int, int]] = SHAPES, method: str = "m") -> RunRecord:
    return record(method, seed=seed, ranks=dict(ranks), shapes=dict(shapes))


class TestAgreement:
    def test_is_that_of_a_slow_reference(self) -> None:
        runs: list[Ranks] = [some_ranks(seed) for seed in range(4)]
        found = agreement(runs, SHAPES.__getitem__)
        assert found.shared == pytest.approx(slow_share(runs))
        assert found[1:] == pytest.approx(slow_chance(runs, SHAPES, 1500), abs=0.02)
        assert shared(runs) == found.shared

    def test_by_hand(self) -> None:
        found = agreement([{"a": 3, "b": 1}, {"a": 1, "b": 1}], everywhere)
        assert found.shared == 2 * (1 + 1) / (4 + 2)
        assert found.chance == pytest.approx(found.shared)  # dealt either way, 2 are shared

    def test_of_equal_ranks_is_whole_and_of_independent_ones_that_of_chance(self) -> None:
        ranks = {str(layer): layer % 4 for layer in range(40)}
        found = agreement([ranks, ranks, ranks], everywhere)
        assert found.shared == 1
        assert found.is_beyond_chance
        other = {str(layer): (layer // 4) % 4 for layer in range(40)}  # independent of the first, nearly exactly
        found = agreement([ranks, other], everywhere)
        assert found.low <= found.shared <= found.high

    def test_a_preference_for_a_shape_is_no_agreement(self) -> None:
        runs = [
            {
                f"{shape}{layer}": 5 * (shape == "wide") + (layer + shift) % 2
                for shape in ("wide", "narrow")
                for layer in range(8)
            }
            for shift in (0, 1)
        ]
        found = agreement(runs, lambda layer: layer[:-1])
        assert found.shared <= found.low  # the layers with one more are never the same
        assert agreement(runs, everywhere).high < found.shared

    def test_is_the_same_each_time(self) -> None:
        runs = [some_ranks(seed) for seed in range(3)]
        assert agreement(runs, module_of) == agreement(runs, module_of)

    def test_a_layer_that_a_run_lacks_has_rank_0(self) -> None:
        assert agreement([{"a": 2, "b": 2}, {"a": 2}], everywhere) == agreement(
            [{"a": 2, "b": 2}, {"a": 2, "b": 0}], everywhere
        )

    def test_of_nothing_at_all(self) -> None:
        assert shared([{"a": 0}, {"a": 0}]) == 1
        assert shared([{"a": 0}, {"a": 1}]) == 0

    def test_needs_two_runs(self) -> None:
        with pytest.raises(ValueError, match="needs two runs"):
            agreement([{"a": 1}], everywhere)


class TestWhatIsDealt:
    def test_layers_of_one_shape_where_records_hold_them(self) -> None:
        ranks = [some_ranks(seed) for seed in range(3)]
        of = board(*(ranked(seed, each) for seed, each in enumerate(ranks)))
        (found,) = agreements(of)
        assert found.found == agreement(ranks, SHAPES.__getitem__)
        assert found.components == tuple(sum(each.values()) for each in ranks)
        assert "among layers of one shape" in " ".join(agreement_table(of, [found]).notes)

    def test_layers_whose_names_differ_in_numbers_alone_where_they_do_not(self) -> None:
        ranks = [some_ranks(seed) for seed in range(3)]
        of = board(*(ranked(seed, each, {}) for seed, each in enumerate(ranks)))
        (found,) = agreements(of)
        assert found.found == agreement(ranks, lambda layer: layer.rpartition(".")[2])
        assert "whose names differ in numbers alone" in " ".join(agreement_table(of, [found]).notes)

    def test_one_record_with_shapes_is_enough_for_a_model(self) -> None:
        square = dict.fromkeys(LAYERS, (8, 8))
        ranks = [some_ranks(seed) for seed in range(2)]
        (found,) = agreements(board(ranked(0, ranks[0], {}), ranked(1, ranks[1], square)))
        assert found.found == agreement(ranks, everywhere)

    @pytest.mark.parametrize(
        ("name", "module"),
        [
            ("encoder.layer.3.attention.self.query", "encoder.layer.attention.self.query"),
            ("layer1.0.conv2", "layer1.conv2"),
        ],
    )
    def test_a_modules_name(self, name: str, module: str) -> None:
        assert module_of(name) == module

    def test_rows_without_ranks_of_two_seeds_or_with_even_ones_are_left_out(self) -> None:
        even = {layer: 8 if layer.endswith("query") else 2 for layer in LAYERS}
        of = board(
            *(ranked(seed, even, method="even") for seed in range(3)),
            *(ranked(seed, {}, method="none") for seed in range(3)),
            ranked(0, some_ranks(0), method="one"),
            *(ranked(seed, some_ranks(seed), method="chosen") for seed in range(2)),
        )
        assert [each.label for each in agreements(of)] == ["chosen"]

    def test_a_task_with_several_splits_stands_once(self, tmp_path: Path) -> None:
        runs = [
            record(
                "m",
                seed=seed,
                ranks=some_ranks(seed),
                rows={"train": 1, "holdout": 1, "first": 1, "second": 1},
                others={"second_accuracy": 0.4},
            )
            for seed in range(2)
        ]
        store = stored(tmp_path, *runs)
        assert cli.main(["report", "--results", str(store.results), "--every-split"]) == 0
        assert len((tmp_path / "tables" / "rank_agreement.csv").read_text().splitlines()) == 2


class TestCommand:
    def test_files_page_and_console_where_asked(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        stored(tmp_path, *(ranked(seed, some_ranks(seed)) for seed in range(3)))
        assert cli.main(["report", "--results", str(tmp_path)]) == 0
        assert "Agreement of seeds on ranks" not in capsys.readouterr().out
        assert cli.main(["report", "--results", str(tmp_path), "--rank-agreement"]) == 0
        assert "Agreement of seeds on ranks" in capsys.readouterr().out
        (found,) = agreements(board(*(ranked(seed, some_ranks(seed)) for seed in range(3))))
        text = (tmp_path / "tables" / "rank_agreement.csv").read_text()
        assert str(found.found.shared) in text
        for name in ("tables/rank_agreement.md", "report.html"):
            content = (tmp_path / name).read_text()
            assert "Agreement of seeds on ranks" in content
            assert f"{found.found.shared:.2f}" in content

    def test_without_ranks_there_is_no_table(self, tmp_path: Path) -> None:
        stored(tmp_path, *(record(seed=seed) for seed in range(3)))
        assert cli.main(["report", "--results", str(tmp_path), "--rank-agreement"]) == 0
        assert not list((tmp_path / "tables").glob("rank_agreement*"))
