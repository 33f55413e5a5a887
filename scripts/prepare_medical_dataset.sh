#!/usr/bin/env bash
# Meshes and label volumes to a prepared dataset (truth meshes, sparse SDFs at 64, 512 and 1024 cubed, metadata.csv):
#   bash scripts/prepare_medical_dataset.sh DATA_ROOT OUT [options of python -m dataset_toolkits.compute_sparse_sdf]
# Run it again to continue after an interruption or to add data; what is there already is kept.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [ "$#" -lt 2 ] && [ "${1:-}" != "--help" ]; then
    echo "usage: bash scripts/prepare_medical_dataset.sh DATA_ROOT OUT [options]   (--help lists them)" >&2
    exit 2
fi
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    PATH="$root/.venv/bin:$PATH"
fi
command -v python >/dev/null || python() { python3 "$@"; }
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one process a core: more threads would only get in each other's way
python -m dataset_toolkits.compute_sparse_sdf "$@"
