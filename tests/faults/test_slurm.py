"""The SLURM launcher against a real slurmctld and slurmd on this machine."""

import csv
import os
import pathlib
import subprocess
import sys

import pytest

from dpo_jax.sweep.status import Place, State
from dpo_jax.writers import read_metrics
from faults.slurm import Slurm, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "is here")
ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 1500
CONFIG = f"""
from configs import sweep_beta
from dpo_jax import sweep

def get_config(arg=None):
  config = sweep_beta.get_config(arg)
  config.model.width = 16
  config.model.layers = 1
  config.model.heads = 2
  config.model.kv_heads = 1
  config.model.ffn = 32
  config.data.eval_rows = 16
  config.data.row_length = 512
  config.train.batch_size = 4
  config.train.steps = {STEPS}
  config.train.checkpoint_every = 100
  config.train.eval_every = 0
  config.train.log_every = 10
  config.sample.prompts = 0
  return config

def get_sweep():
  return sweep.listed("loss.beta", 0.1, 0.3)
"""


@pytest.fixture
def slurm(tmp_path):
  with Slurm(tmp_path / "slurm") as slurm:
    slurm.environment |= {
      "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    yield slurm


def run(slurm, folder, script, *flags):
  (folder / "config.py").write_text(CONFIG)
  done = subprocess.run(
    [
      sys.executable, script, f"--workdir={folder / 'runs'}",
      f"--config={folder / 'config.py'}:data={folder / 'corpus'}", *flags,
    ],
    cwd=ROOT, env=slurm.environment, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return done.stdout


def launch(slurm, folder, *flags):
  settings = [f"--set={x}" for x in ("gpus=0", "cpus=1", "time=10", "grace=60")]
  python = f"--python={sys.executable}"
  run(
    slurm, folder, "scripts/launch.py", "--to=slurm", python, *settings, *flags
  )


def preempt(slurm, cpus=2):
  """A job that goes first takes the node, for a moment."""
  slurm.call("sbatch", "-phigh", f"-n{cpus}", "--output=/dev/null",
             "--wrap=sleep 1")  # fmt: skip


def under_way(folder):
  """Work directories that have a checkpoint by now."""
  return [p for p in folder.glob("*") if Place(p).step()]


def steps(place):
  rows = read_metrics(place.metrics)
  return [row["step"] for row in rows if row["split"] == "train"]


def logs(folder):
  files = sorted((folder / "runs" / "slurm").iterdir())
  return [file.read_text() for file in files]


def test_preempted_tasks_of_an_array_are_requeued_and_continue(slurm, tmp_path):
  launch(slurm, tmp_path, "--sweep=get_sweep")
  folder = tmp_path / "runs" / "runs"
  slurm.wait_for(lambda: len(under_way(folder)) == 2)
  places = [Place(path) for path in folder.iterdir()]
  preempt(slurm)
  slurm.wait_for(
    lambda: list(slurm.states().values()) == ["PENDING"] * 2
  )  # the job that came first is through, and these wait for their turn
  before = [place.step() for place in places]
  assert all(0 < step < STEPS for step in before)
  slurm.hurry()
  slurm.wait_for(lambda: not slurm.states())

  for place, step in zip(places, before, strict=True):
    assert place.state() is State.DONE
    assert steps(place) == list(range(10, STEPS + 1, 10))
    (log,) = [x for x in logs(tmp_path) if str(place.path) in x]
    # Stopped once by a signal, with its checkpoint, and went on from there.
    assert log.count("saving after this step") == 1
    assert f"continuing at step {step} of {STEPS}" in log
  out = run(slurm, tmp_path, "scripts/sweep.py", "--table")
  assert out.count("| done |") == 2
  with open(tmp_path / "runs" / "table.csv") as file:
    assert len(list(csv.DictReader(file))) == 2
  assert "all runs are done" in run(
    slurm, tmp_path, "scripts/launch.py", "--to=slurm", "--sweep=get_sweep"
  )


def test_a_cancelled_task_saves_and_is_not_requeued(slurm, tmp_path):
  launch(slurm, tmp_path, "--sweep=get_sweep")
  folder = tmp_path / "runs" / "runs"
  slurm.wait_for(lambda: len(under_way(folder)) == 2)
  slurm.call("scancel", min(slurm.states()))
  slurm.wait_for(lambda: not slurm.states())
  states = [Place(path).state() for path in folder.iterdir()]
  assert sorted(s.value for s in states) == ["done", "stopped"]


def test_a_run_of_two_processes_stops_and_continues_as_one(slurm, tmp_path):
  """JAX finds its processes on SLURM by itself."""
  fewer = ("--config.train.steps=160", "--config.train.checkpoint_every=10")
  launch(slurm, tmp_path, "--set=processes=2", *fewer)
  place = Place(tmp_path / "runs")
  slurm.wait_for(place.step)
  preempt(slurm)
  slurm.wait_for(lambda: list(slurm.states().values()) == ["PENDING"])
  before = place.step()
  assert 0 < before < 160
  slurm.hurry()
  slurm.wait_for(lambda: not slurm.states())
  assert place.state() is State.DONE
  assert steps(place) == list(range(10, 161, 10))
  (log,) = logs(tmp_path)
  assert f"continuing at step {before} of 160" in log
