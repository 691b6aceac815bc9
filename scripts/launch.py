"""Sends a run, or the runs of a sweep, to a cluster.

  python scripts/launch.py --to=slurm --config=configs/dpo.py \
    --workdir=/shared/dpo --config.model.path=MODEL \
    --config.data.source=PAIRS.jsonl --set=partition=gpu --set=time=8:00:00
  python scripts/launch.py --to=slurm --config=configs/sweep_beta.py \
    --sweep=get_sweep --workdir=/shared/beta --dry_run

--to is slurm (one array job), gke (a JobSet a run), sky (a SkyPilot managed job
a run) or tpu (ssh to a TPU VM, one run after another). The templates are in
scripts/launch, what --set takes is in dpo_jax/sweep/launch.py. --dry_run prints
exactly what would be sent. Runs whose work directories are complete are left
out; scripts/sweep.py --table writes the table at the end.
"""

import pathlib

from absl import flags

from dpo_jax import main

_TO = flags.DEFINE_enum(
  "to", None, ["slurm", "gke", "sky", "tpu"], "Where to.", required=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory on the cluster.")
_SWEEP = flags.DEFINE_string(
  "sweep", "", "Function of the config file that yields overrides; '': one run."
)
_SET = flags.DEFINE_multi_string("set", [], "key=value of the template.")
_PYTHON = flags.DEFINE_string("python", "python", "Python on the cluster.")
_DRY = flags.DEFINE_bool("dry_run", False, "Print what would be sent.")

_TEMPLATES = pathlib.Path(__file__).resolve().with_name("launch")


def _main(config):
  from dpo_jax.errors import ConfigError
  from dpo_jax.sweep import launch
  from dpo_jax.sweep.setup import read_tasks

  if not _WORKDIR.value:
    raise ConfigError("name a directory, e.g. --workdir=/shared/runs/dpo")
  if not _SWEEP.value:
    config.make_loss()
  options = launch.parse_options(_TO.value, _SET.value)
  workdir, name, tasks = read_tasks(
    flags.FLAGS["config"], _WORKDIR.value, _PYTHON.value, _SWEEP.value
  )
  if not tasks:
    print("all runs are done")
    return
  files = launch.render(_TO.value, _TEMPLATES, name, workdir, tasks, options)
  if _DRY.value:
    print(launch.describe(_TO.value, files), end="")
    return
  if _TO.value == "slurm":
    (workdir / "slurm").mkdir(parents=True, exist_ok=True)  # of the logs
  launch.submit(_TO.value, files)


if __name__ == "__main__":
  main.run(_main, goes_on=True)
