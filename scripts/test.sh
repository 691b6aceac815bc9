#!/usr/bin/env bash
# Sets up .venv and runs the tests; further arguments go to pytest. With `--slow`
# first, runs those that train, kill and continue whole runs; with `--parity`,
# the comparisons with torch, transformers and TRL.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
install requirements-test.txt
group="not parity and not slow"
if [ "${1:-}" = "--slow" ]; then
  shift
  group="slow"
elif [ "${1:-}" = "--parity" ]; then
  shift
  install requirements-parity.txt
  group="parity"
  export OMP_NUM_THREADS=1  # torch's threads would wait for one another
fi
# Two processes: compiling, most of the time, takes one core. Each file stays
# with one of them, the longest come first; -n0 turns it off.
exec "$venv/bin/python" -m pytest -m "$group" -n 2 --dist loadfile \
  --no-loadscope-reorder "$@"
