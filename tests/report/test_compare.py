"""`compare` and the marks of ties: verdicts that the data allow, in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from harness import cli, registry
from harness.errors import InputError
from harness.record.record import PREDICTIONS, RunRecord
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board, leaderboards, sorted_by
from harness.report.board.runs import runs_of
from harness.report.evidence.compare import Comparison, ExampleReader, compare, in_words, row_of, with_ties
from harness.report.forms.text import markdown
from harness.report.statistics import over_tasks
from tests.support.report_records import NAMING, chosen, predicted, record, rewritten, stored, trial

EXAMPLES = 400


def right(share: float, seed: int, method: int = 0) -> np.ndarray:
    """Which of the examples a model has right: the same hard ones for every model, and some chance of its own."""
    hard = np.random.default_rng(99).random(EXAMPLES)
    own = np.random.default_rng([seed, method]).random(EXAMPLES)
    return 0.7 * hard + 0.3 * own < share


def with_predictions(folder: Path, *runs: tuple[RunRecord, np.ndarray]) -> RecordStore:
    """A store of runs of binary classification, their scores those of the predictions."""
    references = np.random.default_rng(5).integers(0, 2, EXAMPLES)
    store = stored(folder)
    for made, is_right in runs:
        score = float(is_right.mean())
        full = made.model_copy(update={"score": score, "rows": {"train": 9, "holdout": 1, "validation": EXAMPLES}})
        draft = store.draft(full.run_id)
        predicted(draft, np.where(is_right, references, 1 - references), references)
        store.write(full, [], draft)
    return store


def two_methods(folder: Path, shares: tuple[float, float], seeds: int = 3, task: str = "digits") -> RecordStore:
    runs = [
        (record(method, task, seed=seed), right(share, seed, place))
        for place, (method, share) in enumerate(zip(("lora", "head"), shares, strict=True))
        for seed in range(seeds)
    ]
    return with_predictions(folder, *runs)


def board_of(store: RecordStore) -> Board:
    (only,) = leaderboards(runs_of(store.records(), NAMING))
    return only


def compared(store: RecordStore, first: str = "lora", second: str = "head") -> list[Comparison]:
    board = board_of(store)
    (found,) = compare(board, [(row_of(board, first), row_of(board, second))], ExampleReader(store))
    return found


class TestVerdict:
    def test_better_with_the_numbers_behind_it(self, tmp_path: Path) -> None:
        (found,) = compared(two_methods(tmp_path, (0.7, 0.55)))
        assert found.verdict == "better"
        assert found.num_examples == EXAMPLES
        assert found.difference is not None
        assert found.difference.interval[0] > 0
        assert len(found.mcnemar) == 3
        words = "\n".join(in_words("lora", "head", [found]))
        assert "digits (accuracy): lora is better than head" in words
        assert "seeds and 400 examples" in words
        assert "would have found a difference of" in words

    def test_the_other_way_round_is_worse(self, tmp_path: Path) -> None:
        store = two_methods(tmp_path, (0.7, 0.55))
        (one,), (other,) = compared(store), compared(store, "head", "lora")
        assert other.verdict == "worse"
        assert one.difference is not None
        assert other.difference is not None
        assert other.difference.interval == pytest.approx([-end for end in reversed(one.difference.interval)])

    def test_undecided_where_the_interval_includes_zero(self, tmp_path: Path) -> None:
        (found,) = compared(two_methods(tmp_path, (0.6, 0.6)))
        assert found.verdict == "undecided"
        assert "undecided: the interval includes 0" in in_words("lora", "head", [found])[0]

    def test_lower_is_better(self, tmp_path: Path) -> None:
        runs = [
            record(
                method, seed=seed, score=score + 0.001 * seed**2 * (1 + place), headline="loss", higher_is_better=False
            )
            for place, (method, score) in enumerate((("lora", 0.2), ("head", 0.4)))
            for seed in range(3)
        ]
        (found,) = compared(stored(tmp_path, *runs))
        assert found.verdict == "better"
        assert found.difference is not None
        assert found.difference.mean < 0
        assert board_of(stored(tmp_path)).rows[0].label == "lora"

    def test_one_seed_decides_nothing(self, tmp_path: Path) -> None:
        (found,) = compared(two_methods(tmp_path, (0.9, 0.3), seeds=1))
        assert found.verdict == "undecided"
        assert found.difference is None
        assert found.mcnemar[0] < 0.001
        words = "\n".join(in_words("lora", "head", [found]))
        assert "one seed says nothing about other seeds" in words
        assert "95 % interval: not available" in words

    def test_no_seed_in_common(self, tmp_path: Path) -> None:
        (found,) = compared(stored(tmp_path, record("lora", seed=0), record("head", seed=1)))
        assert found.verdict == "not comparable"
        assert "no seed on which both" in in_words("lora", "head", [found])[0]

    def test_without_predictions_seeds_alone(self, tmp_path: Path) -> None:
        runs = [
            record(m, seed=s, score=0.5 + 0.1 * (m == "lora") + 0.01 * s * (m == "head"))
            for m in ("lora", "head")
            for s in range(3)
        ]
        (found,) = compared(stored(tmp_path, *runs))
        assert found.num_examples is None
        assert found.mcnemar == ()
        assert "seeds alone" in "\n".join(in_words("lora", "head", [found]))

    def test_holm_over_tasks_may_take_a_verdict_back(self, tmp_path: Path) -> None:
        spread = {"a": 0.1, "b": 0.02, "c": -0.02, "d": 0.01}
        runs = [
            record(
                method, task, seed=seed, score=0.5 + (method == "lora") * (gap + 0.018 * (seed - 1) * abs(gap) / 0.1)
            )
            for method in ("lora", "head")
            for task, gap in spread.items()
            for seed in range(3)
        ]
        noisy = [
            run.model_copy(update={"score": run.score + 0.03 * (run.spec.seed - 1)})
            if run.spec.task != "a" and run.spec.method == "head" and run.score is not None
            else run
            for run in runs
        ]
        found = {each.column.title: each for each in compared(stored(tmp_path, *noisy))}
        first = found["a"]
        assert first.difference is not None
        assert first.difference.p_value < 0.05
        assert first.adjusted_p == pytest.approx(min(1, 4 * first.difference.p_value))
        alone = compared(stored(tmp_path / "alone", *[run for run in noisy if run.spec.task == "a"]))
        assert alone[0].adjusted_p == pytest.approx(first.difference.p_value)

    def test_over_tasks(self, tmp_path: Path) -> None:
        for task in ("a", "b", "c"):
            store = two_methods(tmp_path, (0.7, 0.5), task=task)
        words = "\n".join(in_words("lora", "head", compared(store)))
        assert "over 3 tasks: probability that a run of lora beats one of head: 1.00" in words
        assert "interquartile mean of lora: 0." in words
        (line,) = [line for line in words.splitlines() if "mean difference over these tasks" in line]
        overall = over_tasks([each.difference for each in compared(store)])
        assert overall is not None
        low, high = overall.interval
        assert f": {overall.mean:+.4f} (95 % interval: {low:+.4f} to {high:+.4f};" in line

    def test_no_mean_over_tasks_where_one_has_no_difference(self, tmp_path: Path) -> None:
        runs = [
            record(method, task, seed=seed, score=0.5 + 0.1 * (method == "lora") + noise * seed * (method == "head"))
            for method in ("lora", "head")
            for task, noise in (("a", 0.0), ("b", 0.01))
            for seed in range(3)
        ]
        words = "\n".join(in_words("lora", "head", compared(stored(tmp_path, *runs))))
        assert "over 2 tasks: probability" in words
        assert "mean difference over these tasks: not available" in words

    def test_one_task_in_two_columns_has_no_mean(self, tmp_path: Path) -> None:
        comparisons = compared(two_methods(tmp_path, (0.7, 0.5)))
        words = "\n".join(in_words("lora", "head", [*comparisons, *comparisons]))
        assert "mean difference" not in words


class TestDamagedPredictions:
    @pytest.mark.parametrize(
        "damage", [b"", b"no tensors", save({"other": np.zeros(2)}), "cut", "gone", "folder", "link"]
    )
    def test_are_told_once_and_cost_their_cell_only(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes | str
    ) -> None:
        two_methods(tmp_path, (0.7, 0.5), task="a")
        store = two_methods(tmp_path, (0.7, 0.5), task="b")
        damaged = record("lora", "a", seed=1).run_id
        path = store.folder(damaged) / PREDICTIONS
        if isinstance(damage, bytes):
            rewritten(store, damaged, PREDICTIONS, damage)
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.unlink()
            if damage == "folder":
                path.mkdir()
            elif damage == "link":
                path.symlink_to(store.folder(record("lora", "b").run_id) / PREDICTIONS)
        board = with_ties(board_of(store), ExampleReader(store))
        (note,) = [note for note in board.notes if "cannot be used" in note]
        assert damaged in note
        assert "\n" not in note
        assert cli.main(["compare", "lora", "head", "--results", str(tmp_path)]) == 0
        out, err = capsys.readouterr()
        assert err.count("cannot be used") == 1
        assert damaged in err
        of_a, _, of_b = out.partition("\nb (accuracy)")
        assert "seeds alone" in of_a
        assert "seeds and 400 examples" in of_b

    def test_that_were_not_kept_are_no_damage(self, tmp_path: Path) -> None:
        store = stored(tmp_path, *(record(m, seed=s, rows={"validation": 9}) for m in ("lora", "head") for s in (0, 1)))
        assert not any("cannot be used" in note for note in with_ties(board_of(store), ExampleReader(store)).notes)


class TestTies:
    def test_marked_where_no_test_tells(self, tmp_path: Path) -> None:
        store = two_methods(tmp_path, (0.6, 0.59))
        board = with_ties(board_of(store), ExampleReader(store))
        best, other = board.rows
        assert board.is_best(best, board.columns[0])
        assert board.is_tie(other, board.columns[0])
        assert not board.is_tie(best, board.columns[0])
        assert "≈</u>" in markdown([board])

    def test_not_marked_where_one_does_or_none_can(self, tmp_path: Path) -> None:
        """Examples apart on three seeds, and two seeds of equal scores without examples."""
        apart = two_methods(tmp_path / "apart", (0.75, 0.5))
        scores = {"lora": 0.75, "head": 0.5}
        flat = [record(method, seed=seed, score=score) for method, score in scores.items() for seed in (0, 1)]
        for store, untested in ((apart, []), (stored(tmp_path / "flat", *flat), [True])):
            board = with_ties(board_of(store), ExampleReader(store))
            assert not any(board.is_tie(row, board.columns[0]) for row in board.rows)
            notes = [note for note in board.notes if note.startswith("Not tested against the best on digits")]
            assert [note.endswith("head.") for note in notes] == untested

    def test_are_the_same_in_any_order_of_the_rows(self, tmp_path: Path) -> None:
        """0.82304 and 0.82301 print alike: the reference is the better one, not the one above."""
        runs = [
            record(method, seed=seed, score=score + 0.01 * seed, numbers=numbers)
            for method, score, numbers in (("lora", 0.82301, 10), ("head", 0.82304, 1000))
            for seed in range(3)
        ]
        store = stored(tmp_path, *runs)
        read = ExampleReader(store)
        for name in ("parameters", "digits", "method"):
            (board,) = sorted_by([board_of(store)], name)
            marked = with_ties(board, read)
            assert {row.label: marked.is_tie(row, board.columns[0]) for row in board.rows}["head"] is False


class TestCommand:
    def test_prints_the_verdict(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        two_methods(tmp_path, (0.7, 0.5))
        assert cli.main(["compare", "lora", "head", "--results", str(tmp_path)]) == 0
        assert "lora is better than head" in capsys.readouterr().out

    def test_rows_may_be_written_as_on_the_command_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """By PEFT's names, in any order, and with values that are the default."""
        four = registry.make_method("lora", {"rank": 4, "dropout": 0.1}).model_dump(mode="json")
        stored(tmp_path, record("lora", method_parameters=four), record("head"))
        assert cli.main(["compare", "lora[lora_dropout=0.1,r=4,alpha=16]", "head", "--results", str(tmp_path)]) == 0
        assert "lora[rank=4,dropout=0.1] against head" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["lara", "head"], "unknown row 'lara'. Did you mean 'lora'?"),
            (["lora", "lora"], "'lora' and 'lora' are the same row"),
            (["lora", "head", "--tasks", "digit"], "unknown task among the records 'digit'. Did you mean 'digits'?"),
        ],
    )
    def test_bad_input(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        stored(tmp_path, record("lora"), record("head"))
        assert cli.main(["compare", *arguments, "--results", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err

    def test_several_rows_of_a_method_are_named(self, tmp_path: Path) -> None:
        four, eight = ({"tau": tau, "rank": 8} for tau in (4.0, 8.0))
        store = stored(tmp_path, record("debora", method_parameters=four), record("debora", method_parameters=eight))
        with pytest.raises(InputError, match=r"several are of this method.*debora\[tau=4\]"):
            row_of(board_of(store), "debora")
        rank = record("debora", method_parameters={"tau": 4.0, "rank": 2})
        label = row_of(board_of(stored(tmp_path / "two", rank)), "debora[tau=4, rank=2]").label
        assert label == "debora[tau=4,rank=2]"  # the console has a blank after the comma

    def test_lists_are_compared_each_with_each_under_one_correction(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        two_methods(tmp_path, (0.7, 0.5))
        four, eight = ({"tau": tau, "rank": 8, "recipe": "ours"} for tau in (4.0, 8.0))
        runs = [
            (record("debora", method_parameters=parameters, seed=seed), right(0.69, seed, place))
            for place, parameters in enumerate((four, eight), start=2)
            for seed in range(3)
        ]
        store = with_predictions(tmp_path, *runs)
        arguments = ["compare", "debora[tau=4],debora[tau=8],lora", "lora, head", "--results", str(tmp_path)]
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        pairs = [line.partition(". Model")[0] for line in out.splitlines() if " against " in line]
        first = [f"debora[tau={tau}] against {other}" for tau in (4, 8) for other in ("lora", "head")]
        assert pairs == [*first, "lora against head"]  # lora not with itself
        board = board_of(store)
        rows = [(row_of(board, "lora"), row_of(board, "head")), (row_of(board, "debora[tau=4]"), board.rows[0])]
        together, alone = compare(board, rows, ExampleReader(store)), compare(board, rows[:1], ExampleReader(store))
        assert together[0][0].adjusted_p == pytest.approx(2 * (alone[0][0].adjusted_p or 0))

    def test_a_pair_is_compared_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        two_methods(tmp_path, (0.7, 0.5))
        assert cli.main(["compare", "lora,head", "lora,head", "--results", str(tmp_path)]) == 0
        assert capsys.readouterr().out.count(" against ") == 1

    def test_a_row_is_looked_for_on_every_board(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        runs = [
            record(m, seed=s, threads=2, score=0.5 + 0.1 * s * (m == "full")) for m in ("full", "head") for s in (0, 1)
        ]
        stored(tmp_path, *runs, *(record("lora", seed=seed) for seed in range(9)))
        assert cli.main(["compare", "full", "head", "--results", str(tmp_path)]) == 0
        assert cli.main(["compare", "ful", "lora", "--results", str(tmp_path)]) == 2
        assert "unknown row 'ful'. Did you mean 'full'?" in capsys.readouterr().err
        assert cli.main(["compare", "full", "lora", "--results", str(tmp_path)]) == 2
        assert "'full' and 'lora' have no task in common" in capsys.readouterr().err

    def test_a_label_told_apart_by_its_tuning_needs_no_more_than_its_beginning(self, tmp_path: Path) -> None:
        trials = [trial(learning_rate=rate) for rate in (1e-3, 1e-2)]
        others = [record("lora", method_parameters={"rank": 2, "targets": ["query", "value"], "learning_rate": 1.0})]
        board = board_of(stored(tmp_path, *trials, chosen(trials, 1e-3, seed=0), *others))
        assert row_of(board, "lora").label == "lora (tuned 2)"

    def test_no_records(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["compare", "lora", "head", "--results", str(tmp_path)]) == 2
        assert "no records in" in capsys.readouterr().err
