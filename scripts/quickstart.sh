#!/usr/bin/env bash
# Sets up .venv and runs the quickstart: SFT, then DPO, then what changed.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
install requirements.txt
exec "$venv/bin/python" scripts/quickstart.py "$@"
