#!/usr/bin/env bash
# Reports detection quality and cost: scripts/eval.sh --config configs/shapes.yaml [--run FOLDER] [overrides]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
exec .venv/bin/python eval.py "$@"
