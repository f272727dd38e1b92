#!/usr/bin/env bash
# Runs a stage after setting up the environment: scripts/stage.sh pretrain --config configs/shapes.yaml [overrides]
#
# NPROC=4 starts four processes with torchrun, one per GPU, or four on a CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage=$1
shift
bash scripts/setup.sh
if [[ "${NPROC:-1}" == 1 ]]; then
  exec .venv/bin/python "$stage.py" "$@"
fi
# Without `--`, torchrun would read `--run` as an abbreviation of its own option --run-path.
exec .venv/bin/python -m instaqnas.launch --standalone --nproc-per-node "$NPROC" -- "$stage.py" "$@"
