"""The report's own pictures. A package adds one through the entry-point group `harness.pictures`."""

from __future__ import annotations

from harness.report.pictures import critical, curves, layers, lines, scatter
from harness.report.pictures.cost import FORGETTING
from harness.report.pictures.picture import Picture

PICTURES = (
    Picture("score_vs_parameters", "Score against adapter parameters", lambda data: scatter.draw(data.board)),
    Picture("score_vs_forgetting", "Score against forgetting", lambda data: scatter.draw(data.board, FORGETTING)),
    Picture(
        "learning_rate_sensitivity",
        "Learning-rate sensitivity",
        lambda data: lines.learning_rates(data.board, data.trials),
    ),
    Picture(
        "rank_curves",
        "Scores of trained adapters cut to several ranks",
        lambda data: lines.rank_curves(data.board, data.is_lora),
    ),
    Picture("learning_curves", "Learning curves", lambda data: curves.learning_curves(data.board, data.histories)),
    Picture("over_time", "What methods report over time", lambda data: curves.over_time(data.board, data.histories)),
    Picture(
        "layers_over_time",
        "What methods report of each layer over time",
        lambda data: layers.over_time(data.board, data.histories),
    ),
    Picture("rank_heat_map", "Rank per layer and module", lambda data: layers.rank_heat_map(data.board, data.records)),
    Picture(
        "singular_values",
        "Singular values of the updates",
        lambda data: layers.singular_values(data.board, data.store, data.singular_values),
    ),
    Picture("critical_difference", "Mean ranks over tasks", lambda data: critical.draw(data.board)),
)
