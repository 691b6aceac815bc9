"""What tests of sweeps share: a config with a place for overrides, and runs
that train nothing and do as they are told."""

import json
import sys
import textwrap

from dpo_jax.config_file import defaults
from dpo_jax.sweep.expand import expand
from dpo_jax.sweep.options import Sweep

# A run whose seed says how it goes; it counts its starts in a file.
RUN = """
import json, os, pathlib, signal, sys, time
flags = dict(a.split("=", 1) for a in sys.argv[1:])
place = pathlib.Path(flags["--workdir"])
kind, starts = int(flags.get("--config.seed", 0)), place / "starts"
times = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (times + 1))

def come_to(step):
  (place / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)

def done():
  result = {"steps": 9, "final_eval": {"loss": 0.5 + kind / 8}}
  (place / "summary.json").write_text(json.dumps(result))
  sys.exit(0)

def asked(number, frame):
  come_to(times + 1)
  sys.exit(75)

signal.signal(signal.SIGTERM, asked)
print("started", flush=True)
if kind < 10:  # ends well
  time.sleep(kind / 10)
  done()
if kind == 10:  # a mistake of the user's
  print("error: no such file")
  sys.exit(2)
if kind == 11:  # crashes always
  raise RuntimeError("broken")
if kind == 12:  # crashes once
  done() if times else sys.exit(1)
if kind == 13:  # is preempted five times, each further on
  if times == 5: done()
  come_to(times + 1); sys.exit(75)
if kind == 14:  # is preempted always, and never comes further
  sys.exit(75)
if kind == 15:  # ends without a summary, as if stopped, then well
  if times: done()
  come_to(1); sys.exit(0)
if kind == 16:  # goes on until it is asked to stop, then ends well
  if times: done()
  time.sleep(60)
if kind == 17:  # says what it was given
  keys = ("CUDA_VISIBLE_DEVICES", "JAX_COMPILATION_CACHE_DIR")
  (place / "given").write_text(json.dumps({k: os.environ.get(k) for k in keys}))
  time.sleep(0.5)
  done()
"""


def base(loss="dpo", **changes):
  config = defaults(loss=loss)
  config.update_from_flattened_dict(changes)
  return config


def sweep_of(root, overrides):
  """A sweep below `root` whose runs are the script above."""
  script = root / "run.py"
  root.mkdir(parents=True, exist_ok=True)
  script.write_text(textwrap.dedent(RUN))
  command = [sys.executable, "-S", str(script)]
  return Sweep(root, command, expand(base(), overrides))


def starts(sweep, number):
  """How often the run was started."""
  file = sweep.place(sweep.runs[number]).path / "starts"
  return len(file.read_text()) if file.exists() else 0


def attempts(sweep, number):
  rows = sweep.place(sweep.runs[number]).attempts.read_text().splitlines()
  return [json.loads(row) for row in rows]
