#!/usr/bin/env bash
# Install what the tests need, then run them: bash scripts/run_tests.sh [pytest options]
# Installs into the active virtual environment (or conda environment); with none active, makes and uses .venv here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ]; then
    bash scripts/install.sh dev
else
    bash scripts/install.sh dev .venv
    PATH="$PWD/.venv/bin:$PATH"
fi

# Two cores shared by many small operations: more threads than cores only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
exec python -m pytest "$@"
