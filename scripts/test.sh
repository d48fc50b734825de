#!/usr/bin/env bash
# Set up what the tests need, then check style, types and behaviour. Arguments go to pytest:
#   bash scripts/test.sh                 everything but the slow tests
#   bash scripts/test.sh -m slow         the slow ones
#   HARNESS_DATA_ROOT=DIR bash scripts/test.sh     the tests on real data too (DIR in the Hub's layout)
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# A process for every CPU; a file stays in one, since its tests share what they made.
.venv/bin/python -m pytest --numprocesses auto --dist loadfile "$@"
