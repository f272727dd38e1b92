#!/usr/bin/env bash
# Fetches PASCAL VOC 2007 and 2012 into data/VOCdevkit: scripts/download_voc.sh [--root FOLDER] [--mirror FOLDER]
#
# Needs 6 GB of disk; the archives, half of that, can be deleted afterwards. Repeat it after an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
exec .venv/bin/python -m instaqnas.tools.download_voc "$@"
