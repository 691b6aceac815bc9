"""scripts/train.py with a fault: FAULT="KIND PROCESS STEP" in the environment.

Before the step is taken, in that process: "raise" raises, "stall" sleeps for
five seconds and "hang" for ten minutes, "term" and "int" send it the signal.
From that step on: "slow" takes half a second longer for each, "full" lets no
file grow beyond 32 kB, as on a disk that is full. "eval" sends SIGTERM when the
evaluation of that step begins, "save" when its checkpoint is being written,
"compile" when the program of the first step is being made.

Of many processes each keeps the programs it compiled: JAX lets the first one
write them, and in the others they have another key.
"""

import os
import pathlib
import resource
import runpy
import signal
import sys
import threading
import time
import types

from jax._src import compiler

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dpo_jax import checkpoint, processes  # noqa: E402
from dpo_jax import train as train_module  # noqa: E402

KIND, PROCESS, STEP = os.environ["FAULT"].split()


def guilty_function():
  if KIND == "raise":
    raise RuntimeError("this one is guilty")
  if KIND == "stall":
    time.sleep(5)
  if KIND == "hang":
    time.sleep(600)
  if KIND == "term":
    os.kill(os.getpid(), signal.SIGTERM)
  if KIND == "int":
    os.kill(os.getpid(), signal.SIGINT)
  if KIND == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))


def batches(run, start, real=train_module._batches):
  for step, batch in real(run, start):
    if step == int(STEP) and processes.number() == int(PROCESS):
      guilty_function()
    if KIND == "slow" and step >= int(STEP):
      time.sleep(0.5)
    yield step, batch


def evaluate(self, step, *rest, real=train_module._Training._evaluate):
  if KIND == "eval" and step == int(STEP):
    signal.raise_signal(signal.SIGTERM)
  return real(self, step, *rest)


def save(self, step, *rest, real=checkpoint.Checkpoints.save):
  real(self, step, *rest)
  mine = processes.number() == int(PROCESS)
  if KIND == "save" and step == int(STEP) and mine:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(2)  # as large arrays would take


def term_soon():
  time.sleep(0.3)
  print("signal while compiling", flush=True)
  os.kill(os.getpid(), signal.SIGTERM)


def start(self, real=train_module.Run.start):
  if KIND == "compile":
    threading.Thread(target=term_soon, daemon=True).start()
  return real(self)


def cache_write(*rest, real=compiler._cache_write):
  state = types.SimpleNamespace(process_id=0)
  compiler.distributed = types.SimpleNamespace(global_state=state)
  try:
    real(*rest)
  finally:
    compiler.distributed = distributed


distributed = compiler.distributed
compiler._cache_write = cache_write
train_module._batches = batches
train_module._Training._evaluate = evaluate
checkpoint.Checkpoints.save = save
train_module.Run.start = start
runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
