"""Runs a sweep: every run that a config file's `get_sweep` yields.

  python scripts/sweep.py --config=configs/sweep_beta.py --workdir=runs/beta \
    --jobs=2

The same command skips the runs that are done, continues those that were
stopped and tries failed ones again. SIGTERM and Ctrl-C stop all, with
checkpoints saved. `--dry_run` prints each command and starts none; `--table`
writes the table of what is there. scripts/launch.py sends the same runs to a
cluster.

Exit status: 0 all done, 75 stopped, 1 some runs failed, 2 bad input.
"""

import os
import pathlib
import sys

from absl import flags

from dpo_jax import main

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep.")
_FUNCTION = flags.DEFINE_string(
  "sweep", "get_sweep", "Function of the config file that yields overrides."
)
_JOBS = flags.DEFINE_integer("jobs", 0, "Runs at a time (1, or one a GPU).")
_GPUS = flags.DEFINE_list("gpus", [], "GPUs to share out, e.g. 0,1,2,3.")
_RETRIES = flags.DEFINE_integer("retries", 2, "Of a run that crashed.")
_DRY = flags.DEFINE_bool("dry_run", False, "Print the commands and end.")
_TABLE = flags.DEFINE_bool("table", False, "Write the table and end.")

_TRAIN = pathlib.Path(__file__).resolve().with_name("train.py")


def _main(config):
  del config  # each run has its own
  from dpo_jax.errors import ConfigError
  from dpo_jax.processes import STOPPED
  from dpo_jax.sweep.local import run_local
  from dpo_jax.sweep.options import LocalOptions, shell
  from dpo_jax.sweep.setup import read_sweep
  from dpo_jax.sweep.status import State
  from dpo_jax.sweep.table import rows_of, to_markdown
  from dpo_jax.sweep.write import write_tables

  if not _WORKDIR.value:
    raise ConfigError("name a directory for all runs, e.g. --workdir=runs/beta")
  gpus = tuple(_GPUS.value)
  jobs = _JOBS.value or max(1, len(gpus))
  options = LocalOptions(jobs, gpus, _RETRIES.value).check()
  train = [sys.executable, os.path.relpath(_TRAIN)]
  sweep = read_sweep(
    flags.FLAGS["config"], _WORKDIR.value, train, _FUNCTION.value
  )
  if _DRY.value:
    for i, run in enumerate(sweep.runs):
      print(f"# {run.id}: {sweep.place(run).state().value}")
      environment = options.environment(i % options.jobs, sweep.root)
      print(shell(sweep.command(run), environment))
    return
  stopped = False
  if not _TABLE.value:
    stopped = run_local(sweep, options)
  rows = rows_of(sweep)
  write_tables(sweep, rows)
  print(to_markdown(rows), end="")
  if stopped:
    sys.exit(STOPPED)
  if not all(row["state"] == State.DONE.value for row in rows):
    sys.exit(0 if _TABLE.value else 1)


if __name__ == "__main__":
  main.run(_main, goes_on=True)
