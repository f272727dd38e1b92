#!/usr/bin/env bash
# Trains the detector under the frozen policy: scripts/finetune.sh --config configs/shapes.yaml [--run FOLDER] [overrides]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
exec .venv/bin/python finetune.py "$@"
