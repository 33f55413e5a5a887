#!/usr/bin/env bash
# Install what the tests need, then run them: bash scripts/run_tests.sh [pytest options]
# All of them run in one process a core (at most 4), those that options choose in one, say -m gpu or -k NAME; -n N decides.
# Installs into the active virtual environment (or conda environment); with none active, makes and uses .venv here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ]; then
    bash scripts/install.sh dev
else
    bash scripts/install.sh dev .venv
    PATH="$PWD/.venv/bin:$PATH"
fi

# Operations are small: threads of two processes would only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$#" -eq 0 ]; then
    cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)))')"
    set -- -n "$((cores < 4 ? cores : 4))" --dist loadfile
fi
exec python -m pytest "$@"
