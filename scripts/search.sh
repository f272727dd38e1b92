#!/usr/bin/env bash
# Trains the policy, and the detector along with it: scripts/search.sh --config configs/shapes.yaml [--run FOLDER] [overrides]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
exec .venv/bin/python search.py "$@"
