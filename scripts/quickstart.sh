#!/usr/bin/env bash
# From nothing to tokens and back: bash scripts/quickstart.sh [OUT]   (default OUT: quickstart_out)
#
# Makes a virtual environment, installs the project, builds a small cohort of template variations (real anatomy, no
# patient), prepares it, trains a small VQ-VAE on the CPU, encodes and decodes the test subjects and scores them.
# A run that was stopped continues where it was. Exit code 3: the promised accuracy was missed.
#
#   VENV=DIR      the virtual environment (default: the active one, else OUT/.venv)
#   SUBJECTS=N    size of the cohort (default 28)
#   STEPS=N       training steps (default: those of the config); for trying things out
#   PROCESSES=N   training processes (default: one per core, 1, 2 or 4)
#   PYTHON=EXE    Python that makes the environment (default python3)
set -euo pipefail

case "${1:-}" in
-h | --help)
    sed -n '2,/^set -/{/^set -/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
-*)
    echo "usage: bash scripts/quickstart.sh [OUT]" >&2
    exit 2
    ;;
esac
[ "$#" -le 1 ] || { echo "usage: bash scripts/quickstart.sh [OUT]" >&2; exit 2; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mkdir -p "${1:-quickstart_out}"
out="$(cd "${1:-quickstart_out}" && pwd)"
config="$root/configs/vae/sparse_sdf_vqvae_64_quickstart.json"
began=$SECONDS
times=()

stage() { # stage TITLE COMMAND...: run a command, say what and for how long
    local title="$1" start=$SECONDS
    shift
    printf '\n== %s\n' "$title"
    "$@"
    times+=("$(printf '%6d s  %s' $((SECONDS - start)) "$title")")
}

install() {
    if [ -n "${VENV:-}" ] || { [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; }; then
        local venv="${VENV:-$out/.venv}"
        bash "$root/scripts/install.sh" quickstart "$venv"
        VIRTUAL_ENV="$(cd "$venv" && pwd)"
        PATH="$VIRTUAL_ENV/bin:$PATH"
        export PATH VIRTUAL_ENV
    else
        bash "$root/scripts/install.sh" quickstart
    fi
    python -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}")'
}

cohort() {
    python -W ignore -m dataset_toolkits.datasets.TemplateCohort "$out/source" --subjects "${SUBJECTS:-28}"
}

prepare() {
    trellis-vqvae prepare "$out/source" -o "$out/data" --resolutions 64
}

train() {
    local options=() processes="${PROCESSES:-}"
    if [ -z "$processes" ]; then # the batch of 4 is divided among them
        local cores
        cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)))')"
        processes=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
    fi
    if [ -n "${STEPS:-}" ]; then
        options+=(--set "trainer.args.max_steps=$STEPS" --set "trainer.args.lr_scheduler.args.total_steps=$STEPS")
    fi
    # one thread a process: the operations are small, and threads of one core get in each other's way
    OMP_NUM_THREADS=1 python "$root/train.py" --config "$config" --data_dir "$out/data" --output_dir "$out/run" \
        --device cpu --num_gpus "$processes" ${options[@]+"${options[@]}"}
}

encode() {
    trellis-vqvae encode "$out/run" "$out/data" --split test -o "$out/tokens" --device cpu
}

decode() {
    trellis-vqvae decode "$out/run" "$out/tokens" -o "$out/meshes" --format stl --device cpu
}

evaluate() {
    trellis-vqvae evaluate "$out/run" "$out/data" --split test -o "$out/eval" --device cpu --workers 2
}

report() {
    python "$root/scripts/quickstart_report.py" "$out" || missed=$?
}

missed=0
stage "1/8 install" install
installed=$SECONDS
stage "2/8 cohort of template variations" cohort
stage "3/8 prepare: truth surfaces and sparse TSDFs at 64" prepare
stage "4/8 train" train
stage "5/8 encode the test subjects: tokens" encode
stage "6/8 decode the tokens: meshes in mm" decode
stage "7/8 evaluate" evaluate
stage "8/8 null models, table and picture" report

printf '\ntimes\n'
printf '%s\n' "${times[@]}"
printf '%6d s  all after the packages, %d s with them\n' $((SECONDS - installed)) $((SECONDS - began))
printf '\nIn %s: data, run, tokens, meshes, eval/summary.json, eval/report.html, overview.png\n' "$out"
exit "$missed"
