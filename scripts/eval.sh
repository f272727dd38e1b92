#!/usr/bin/env bash
# Reports detection quality and cost:
#   scripts/eval.sh --config configs/shapes.yaml [--run FOLDER] [overrides]
# NPROC=2 in the environment runs it in two processes; see scripts/stage.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec bash scripts/stage.sh eval "$@"
