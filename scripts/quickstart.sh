#!/usr/bin/env bash
# Runs everything once, on generated images: scripts/quickstart.sh [overrides, such as --device cpu]
#
# Repeat it after an interruption: complete trainings are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n[%4d s] %s\n' "$SECONDS" "$1"; }
run_stage() { .venv/bin/python "$1.py" --config configs/shapes.yaml --run runs/quickstart "${@:2}"; }

say "1/6 environment in .venv"
bash scripts/setup.sh
say "2/6 data set in data/shapes"
.venv/bin/python -m instaqnas.tools.shapes --root data/shapes
say "3/6 pretrain: the detector, first in full precision, then under random bit-widths"
run_stage pretrain "$@"
say "4/6 search: the policy and the detector"
run_stage search "$@"
say "5/6 finetune: the detector under the frozen policy"
run_stage finetune "$@"
say "6/6 eval: the policy compared with fixed and random bit-widths"
run_stage eval --bits basic "$@"
