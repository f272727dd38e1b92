#!/usr/bin/env bash
# Trains the policy and the detector:
#   scripts/search.sh --config configs/shapes.yaml [--run FOLDER] [overrides]
# NPROC=2 in the environment runs it in two processes; see scripts/stage.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec bash scripts/stage.sh search "$@"
