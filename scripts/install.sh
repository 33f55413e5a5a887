#!/usr/bin/env bash
# Install the project with an extra of pyproject.toml: bash scripts/install.sh [EXTRA [VENV]]   (default EXTRA: dev)
#
# At the tested versions, into the virtual environment VENV, which is made if need be, or without it into the Python that
# `python` names. A second run finds everything in place and takes a second; what was interrupted is finished.
#
#   PYTHON=EXE    Python that makes VENV (default python3)
set -euo pipefail

extra="${1:-dev}"
if [ -n "${2:-}" ]; then
    mkdir -p "$2"
    venv="$(cd "$2" && pwd)"
    # pip is the last thing that comes into a new environment: without it the making was interrupted
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv "$venv"
    PATH="$venv/bin:$PATH"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One line for each extra that was installed to its end, from these files
stamp="$(python -c 'import sys; print(sys.prefix)')/.trellis_vqvae_installed"
state="$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1) $PWD"
if grep -qsxF "$state [$extra]" "$stamp"; then
    exit 0
fi
installed="$(grep -sF "$state [" "$stamp" || true)"
rm -f "$stamp"

constraints=(-c constraints.txt)
if ! python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    # The pinned set was tested on 3.11 and newer; some of its releases do not exist for 3.10.
    echo "Python 3.10: installing by the ranges of pyproject.toml instead of constraints.txt" >&2
    constraints=()
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
python -m pip install --quiet ${constraints[@]+"${constraints[@]}"} -e ".[$extra]"
printf '%s\n' ${installed:+"$installed"} "$state [$extra]" >"$stamp"
