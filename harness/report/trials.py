"""The trials of searches for hyperparameters: how the score on the holdout depends on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from harness.record import RunRecord
from harness.report.frame import Defaults, columns_of, labels_of
from harness.report.leaderboard import Board
from harness.spec import value_text

LEARNING_RATE = "learning_rate"


def trials_frame(records: Iterable[RunRecord], defaults: Defaults | None = None) -> pd.DataFrame:
    """One row per trial and hyperparameter searched over; `defaults`: see `to_frame`.

    Columns: setting, label (the method without the hyperparameters searched over), column, method, method_version,
    task, data_fingerprint, parameter, value, headline, holdout (None where the trial gave no score), status, run_id.
    """
    every = list(records)
    trials = [record for record in every if record.spec.is_trial]
    labels, columns = labels_of(trials, defaults), columns_of(every)
    rows = []
    for record in trials:
        spec = record.spec
        names: dict[str, Any] = {
            "setting": spec.setting_key,
            "label": labels[record.run_id],
            "column": columns[record.run_id],
        }
        names |= {name: getattr(spec, name) for name in ("method", "method_version", "task", "data_fingerprint")}
        score = record.holdout.get(record.headline) if record.status == "done" else None
        assert spec.search is not None
        for parameter in spec.search.parameters:
            value = {"parameter": parameter, "value": value_text(spec.method_parameters[parameter])}
            result = {"headline": record.headline, "holdout": score, "status": record.status, "run_id": record.run_id}
            rows.append(names | value | result)
    return pd.DataFrame(rows)


def learning_rates(board: Board, trials: pd.DataFrame) -> pd.DataFrame:
    """How sensitive each method is to its learning rate on each task: a row for each search over it.

    Columns: task, metric, method, trials, without_score, best_learning_rate, best, median, worst (the last three of the
    trials with a score on the holdout). `trials`: rows of `trials_frame` of the board's setting.
    """
    rows = []
    searched = trials[trials["parameter"] == LEARNING_RATE] if len(trials) else trials
    for column in board.columns if len(searched) else ():
        for label, of_label in searched[searched["column"] == column.title].groupby("label"):
            scored = of_label.dropna(subset="holdout").astype({"holdout": float, "value": float})
            counts = len(of_label), len(of_label) - len(scored)
            best = [None] * 4
            if len(scored):
                ordered = scored.iloc[scored["holdout"].map(column.merit).argsort(kind="stable")]
                ends = [ordered["holdout"].iloc[place] for place in (-1, 0)]
                best = [ordered["value"].iloc[-1], ends[0], scored["holdout"].median(), ends[1]]
            rows.append((column.title, column.headline, label, *counts, *best))
    names = ["task", "metric", "method", "trials", "without_score", "best_learning_rate", "best", "median", "worst"]
    return pd.DataFrame(rows, columns=names)
