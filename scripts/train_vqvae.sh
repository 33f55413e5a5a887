#!/usr/bin/env bash
# Train with the config of a resolution: bash scripts/train_vqvae.sh {64,512,1024} DATA OUT [train.py options]
set -euo pipefail

if [ "$#" -lt 3 ] || [[ ! "$1" =~ ^(64|512|1024)$ ]]; then
    echo "usage: bash scripts/train_vqvae.sh {64,512,1024} DATA OUT [train.py options]" >&2
    exit 2
fi
resolution="$1" data="$2" out="$3"
shift 3
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

python="${PYTHON:-}"
if [ -z "$python" ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python="$root/.venv/bin/python"
fi
if [ -z "$python" ]; then
    python="$(command -v python || echo python3)"
fi
exec "$python" "$root/train.py" \
    --config "$root/configs/vae/sparse_sdf_vqvae_${resolution}.json" --data_dir "$data" --output_dir "$out" "$@"
