#!/usr/bin/env bash
# MLflow's own pages of a results folder, on this machine alone: bash scripts/mlflow_ui.sh [RESULTS] [PORT]
set -euo pipefail
cd "$(dirname "$0")/.."

results=$(realpath "${1:-results}")
address='import sys, pathlib, harness.record.mlflow; print(harness.record.mlflow.default_uri(pathlib.Path(sys.argv[1])))'
exec .venv/bin/mlflow ui --backend-store-uri "$(.venv/bin/python -c "$address" "$results")" --host 127.0.0.1 --port "${2:-5000}"
