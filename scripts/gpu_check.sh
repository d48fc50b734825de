#!/usr/bin/env bash
# Check on your own GPU that every method works there, that runs resume, what is measured, and what a step costs. Prints
# tables in Markdown. It takes the torch that PYTHON has (.venv's, else python3), and skips what lacks its package.
#   bash scripts/gpu_check.sh [--output FILE] [--only contracts,packed,resume,ray,memory,steps] [--device cpu] [more: --help]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
exec "$python" scripts/gpu_check.py "$@"
