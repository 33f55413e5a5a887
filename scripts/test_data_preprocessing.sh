#!/usr/bin/env bash
# Self-check of the data preparation, in under a minute, on shapes that it makes: bash scripts/test_data_preprocessing.sh
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    PATH="$root/.venv/bin:$PATH"
fi
command -v python >/dev/null || python() { python3 "$@"; }
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m dataset_toolkits.self_check "$@"
