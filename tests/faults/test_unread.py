"""Runs whose output nobody reads, as in `train.py 2>&1 | head -1`."""

import os
import subprocess
import sys

from faults.launch import ROOT, TINY, checksums, saved


def unread(corpus, xla, workdir, *flags, fault=""):
  """Exit status of a run whose output goes to a pipe that was closed."""
  script = "tests/faults/faulty_train.py" if fault else "scripts/train.py"
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run(
    [
      sys.executable, str(ROOT / script), f"--config={TINY}:{corpus}",
      f"--workdir={workdir}", *flags,
    ],
    check=False, cwd=ROOT, stdout=write, stderr=write,
    env=os.environ | {
      "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "FAULT": fault,
      "JAX_COMPILATION_CACHE_DIR": str(xla),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    },
  )  # fmt: skip
  os.close(write)
  return done.returncode


def test_a_run_that_nobody_reads_stops_continues_refuses_and_ends_as_any(
  corpus, xla, straight, tmp_path
):
  workdir = tmp_path / "run"
  assert unread(corpus, xla, workdir, fault="term 0 4") == 75
  assert saved(workdir) == [4]
  assert unread(corpus, xla, workdir, "--config.loss.beta=0.7") == 2
  assert unread(corpus, xla, workdir) == 0
  assert checksums(workdir) == checksums(straight)
  assert (workdir / "summary.json").exists()
