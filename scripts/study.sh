#!/usr/bin/env bash
# The study: tables, pictures and text in results/study, and the README's first table, from the records that git keeps.
#   bash scripts/study.sh                         from results/study/records.tar.xz, in under a minute
#   bash scripts/study.sh --run DIR [OPTIONS]     every run first: hours; give it again and it goes on. DIR: data in the Hub's
#                                                 layout, with models/bert-tiny and models/resnet50-half; OPTIONS of `run`
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || bash scripts/install.sh

if [ "${1:-}" = --run ] && [ -d "${2:-}" ]; then
    root=$2
    shift 2
    go_on() { # a failed run is a record (exit code 1), and no reason to stop
        "$@" || [ $? -eq 1 ]
    }
    run() {
        plan=$1
        shift
        go_on "$python" -m harness run --config "scripts/study/$plan.toml" --results "results/study/$plan" \
            --data-root "$root" "$@"
    }
    run main "$@"
    run parts --model "$root/models/bert-tiny" "$@"
    run convolutions --model "$root/models/resnet50-half" "$@"
    cp results/study/parents.json results/study/main/
    "$python" scripts/pack.py results/study
elif [ $# -gt 0 ]; then
    echo "error: '$*' is not --run with a folder that is there" >&2
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
"$python" scripts/study/write.py
