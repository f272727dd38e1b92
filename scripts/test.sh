#!/usr/bin/env bash
# Runs lint, format check and tests: scripts/test.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh --dev
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
# loadfile: the tests of a file share fixtures that take long to make. One thread per test process.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --dist loadfile "$@"
