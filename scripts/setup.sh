#!/usr/bin/env bash
# Makes .venv and installs the requirements. Once that is done, it does nothing and prints nothing.
#
#   scripts/setup.sh          for training and evaluation
#   scripts/setup.sh --deploy for ONNX files too
#   scripts/setup.sh --dev    for the tests too, which also test ONNX files
#
# PYTHON=python3.12 takes another interpreter. pip reads its options from the environment, as for torch without CUDA, a
# much smaller download:
#
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lists=(requirements.txt)
case "$*" in
  "") ;;
  --deploy) lists+=(requirements-deploy.txt) ;;
  --dev) lists+=(requirements-deploy.txt tests/requirements.txt) ;;
  *)
    echo "error: unknown option $*; usage: scripts/setup.sh [--deploy | --dev]" >&2
    exit 2
    ;;
esac

# The stamp of a list of requirements is its checksum, written after it has been installed.
stamp_of() { echo ".venv/installed-${1//\//-}"; }
is_installed() { [[ -x .venv/bin/python && "$(cksum <"$1")" == "$(cat "$(stamp_of "$1")" 2>/dev/null)" ]]; }

make_venv() {
  local python=${PYTHON:-python3}
  if ! command -v "$python" >/dev/null; then
    echo "error: $python: no such Python; name one of 3.10 or newer, as in PYTHON=python3.12 scripts/setup.sh" >&2
    exit 2
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $("$python" --version 2>&1) is too old; name one of 3.10 or newer, as in PYTHON=python3.12 scripts/setup.sh" >&2
    exit 2
  fi
  echo "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
}

for list in "${lists[@]}"; do
  if ! is_installed "$list"; then
    # A .venv without pip is left by an interrupted or failed `python -m venv`.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
    echo "installing $list into .venv"
    # Compiling all modules takes over half of the time; Python compiles a module when it is first imported.
    .venv/bin/python -m pip install --disable-pip-version-check --no-compile -r "$list"
    cksum <"$list" >"$(stamp_of "$list")"
  fi
done
