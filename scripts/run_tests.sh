#!/usr/bin/env bash
# Install what the tests need, then run them: bash scripts/run_tests.sh [pytest options]
# Installs into the active virtual environment (or conda environment); with none active, makes and uses .venv here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    PATH="$PWD/.venv/bin:$PATH"
fi

bash scripts/install.sh

# Two cores shared by many small operations: more threads than cores only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
exec python -m pytest "$@"
