"""Eight devices, for tests of meshes: a process of its own has them, so that
all other tests see what a user sees."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_on_eight(file: str, *args: str) -> str:
  """Runs a test file as a script on eight CPU devices; what it printed."""
  done = subprocess.run(
    [sys.executable, file, *args],
    env=os.environ
    | {
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
      + " --xla_force_host_platform_device_count=8",
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout
