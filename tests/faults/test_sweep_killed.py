"""Twelve trainings on two cores, whose sweep is killed twice on its way."""

import csv
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from dpo_jax.sweep.status import Place, State
from dpo_jax.writers import read_metrics

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 24
TINY = {
  "model.width": 16,
  "model.layers": 1,
  "model.heads": 2,
  "model.kv_heads": 1,
  "model.ffn": 32,
  "data.eval_rows": 16,
  "data.row_length": 512,
  "train.batch_size": 4,
  "train.steps": STEPS,
  "train.checkpoint_every": 4,
  "train.eval_every": 0,
  "train.log_every": 1,
  "sample.prompts": 0,
}


def start(folder, *flags):
  environment = os.environ | {
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # programs that run a few times
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # all runs have the same
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  settings = [f"--config.{key}={value}" for key, value in TINY.items()]
  config = f"--config=configs/sweep_beta.py:data={folder / 'corpus'}"
  workdir = f"--workdir={folder / 'sweep'}"
  return subprocess.Popen(
    [sys.executable, "scripts/sweep.py", config, *settings, workdir, *flags],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )


def places(folder):
  return [Place(path) for path in sorted((folder / "sweep/runs").glob("*"))]


def done(folder):
  return sum(place.complete() for place in places(folder))


def under_way(folder):
  """Runs that have a checkpoint and are not done."""
  return [p for p in places(folder) if p.step() and not p.complete()]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for it")
def test_a_sweep_killed_twice_does_every_run_once(tmp_path):
  for enough in (3, 7):
    process = start(tmp_path, "--jobs=2")
    deadline = time.monotonic() + 120
    while done(tmp_path) < enough or not under_way(tmp_path):
      assert process.poll() is None, "ended before it was killed"
      assert time.monotonic() < deadline, "waited in vain"
      time.sleep(0.02)
    process.kill()
    assert process.wait() == -9
    assert done(tmp_path) < 12
  process = start(tmp_path, "--jobs=2")
  table, _ = process.communicate(timeout=180)
  assert process.returncode == 0

  runs = places(tmp_path)
  assert len(runs) == 12
  logs = [place.log.read_text() for place in runs]
  for place, log in zip(runs, logs, strict=True):
    assert place.state() is State.DONE
    # Came to its end once, was left alone then, and no step counts twice.
    assert log.count(f"step {STEPS}/{STEPS}") == 1
    assert "nothing to do" not in log
    rows = read_metrics(place.metrics)
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == list(range(1, STEPS + 1))
  assert any("continuing at step" in log for log in logs)
  # One of all runs scored the pairs under the reference, the others read that.
  every = "".join(logs)
  assert len(re.findall(r"scoring \d+ examples under the ref", every)) == 1
  assert len(re.findall(r"reference scores of \d+ .* from cache", every)) >= 11

  with open(tmp_path / "sweep" / "table.csv") as file:
    rows = list(csv.DictReader(file))
  assert {(row["loss.name"], float(row["loss.beta"])) for row in rows} == {
    (name, beta)
    for name in ("dpo", "ipo", "apo_zero")
    for beta in (0.03, 0.1, 0.3, 1.0)
  }
  assert [row["state"] for row in rows] == ["done"] * 12
  assert all(row["steps"] == str(STEPS) and row["loss"] for row in rows)
  assert len({row["loss"] for row in rows}) == 12
  assert table.count("| done |") == 12
