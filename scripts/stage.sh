#!/usr/bin/env bash
# Runs a stage after setting up the environment: scripts/stage.sh pretrain --config configs/shapes.yaml [overrides]
#
# NPROC=4 runs it on four GPUs, or in four processes on a CPU: torchrun starts them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage=$1
shift
bash scripts/setup.sh
if [[ "${NPROC:-1}" == 1 ]]; then
  exec .venv/bin/python "$stage.py" "$@"
fi
exec .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$stage.py" "$@"
