"""The trials of searches for hyperparameters: how the score on the holdout depends on them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import pandas as pd

from harness.notation import value_text
from harness.record.record import RunRecord
from harness.report.board.labels import Naming, columns_of, labels_of
from harness.report.board.leaderboard import Board
from harness.report.redact import cut

LEARNING_RATE = "learning_rate"


def trials_frame(records: Iterable[RunRecord], naming: Naming | None = None) -> pd.DataFrame:
    """One row per trial and hyperparameter searched over; `naming`: see `labels_of`.

    Columns: setting, label (the method without the hyperparameters searched over), column, method, method_version,
    task, data_fingerprint, parameter, value, headline, holdout (None where the trial gave no score), chosen (whether
    runs were made of its setting), status, run_id.
    """
    every = list(records)
    trials = [record for record in every if record.spec.is_trial]
    labels, columns, chosen = labels_of(trials, naming), columns_of(every), _chosen(every)
    rows = []
    for record in trials:
        spec = record.spec
        names: dict[str, Any] = {
            "setting": spec.setting_key,
            "label": labels[record.run_id],
            "column": columns[record.run_id],
        }
        names |= {name: getattr(spec, name) for name in ("method", "method_version", "task", "data_fingerprint")}
        names |= {"headline": record.headline, "chosen": record.run_id in chosen}
        score = record.holdout.get(record.headline) if record.status == "done" else None
        assert spec.search is not None
        for parameter in spec.search.parameters:
            value = {"parameter": parameter, "value": value_text(cut(spec.method_parameters[parameter]))}
            result = {"holdout": score, "status": record.status, "run_id": record.run_id}
            rows.append(names | value | result)
    return pd.DataFrame(rows)


def _chosen(records: Iterable[RunRecord]) -> set[str]:
    """run_ids of the trials whose settings were chosen; of a search that was enlarged, by all of its trials."""
    every = {record.run_id: record.spec for record in records}
    searches = {spec.search.trials: spec for spec in every.values() if spec.search and spec.search.trials}
    flags: dict[str, bool] = {}
    for trials, spec in sorted(searches.items(), key=lambda item: len(item[0])):
        for run_id in trials:
            flags[run_id] = run_id in every and every[run_id].method_parameters == spec.method_parameters
    return {run_id for run_id, flag in flags.items() if flag}


def learning_rates(board: Board, trials: pd.DataFrame) -> pd.DataFrame:
    """How sensitive each method is to its learning rate on each task: a row for each search over it.

    Columns: task, metric, method, trials, without_score, chosen_learning_rate, best, median, worst (the last three of
    the trials' scores on the holdout). `trials`: rows of `trials_frame` of the board's setting.
    """
    rows = []
    searched = trials[trials["parameter"] == LEARNING_RATE] if len(trials) else trials
    for column in board.columns if len(searched) else ():
        for label, of_label in searched[searched["column"] == column.title].groupby("label"):
            scores = sorted(of_label["holdout"].dropna().astype(float), key=column.merit)
            spread = (scores[-1], statistics.median(scores), scores[0]) if scores else [None] * 3
            chosen = of_label.loc[of_label["chosen"], "value"].astype(float)
            counts = len(of_label), len(of_label) - len(scores)
            rows.append(
                (column.title, column.headline, label, *counts, chosen.iloc[0] if len(chosen) else None, *spread)
            )
    names = ["task", "metric", "method", "trials", "without_score", "chosen_learning_rate", "best", "median", "worst"]
    return pd.DataFrame(rows, columns=names)
