#!/usr/bin/env bash
# Lint, format check and tests: scripts/test.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh --dev
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# A file's tests stay together, as they share what takes long to make; a process needs no threads then.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --dist loadfile "$@"
