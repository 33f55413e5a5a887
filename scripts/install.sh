#!/usr/bin/env bash
# Install the project and what its tests need into the Python that `python` names, at the tested versions.
# A second run finds everything in place and takes a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp="$(python -c 'import sys; print(sys.prefix)')/.trellis_vqvae_installed"
wanted="$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1) $PWD"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

constraints=(-c constraints.txt)
if ! python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    # The pinned set was tested on 3.11 and newer; some of its releases do not exist for 3.10.
    echo "Python 3.10: installing by the ranges of pyproject.toml instead of constraints.txt" >&2
    constraints=()
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
python -m pip install --quiet "${constraints[@]}" -e ".[dev]"
printf '%s' "$wanted" >"$stamp"
