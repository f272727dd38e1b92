#!/usr/bin/env bash
# Trains the detector, full precision first, then quantized: scripts/pretrain.sh --config configs/shapes.yaml [--run FOLDER] [overrides]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
exec .venv/bin/python pretrain.py "$@"
