"""Trains a policy; the same command continues a run that was stopped.

  python scripts/train.py --config=configs/dpo.py --workdir=runs/dpo \
    --config.model.path=MODEL --config.data.source=PAIRS.jsonl \
    --config.loss.beta=0.2
"""

from absl import flags

from dpo_jax import main

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_PRINT = flags.DEFINE_bool("print_config", False, "Print all settings and end.")
_DRY = flags.DEFINE_bool(
  "dry_run", False, "Print shapes, memory and row 0, take no step, and end."
)


def _main(config):
  from dpo_jax import dry_run
  from dpo_jax.errors import ConfigError
  from dpo_jax.train import Stopped, train

  if _PRINT.value:
    print(dry_run.render_config(config))
  elif _DRY.value:
    print(dry_run.describe(config))
  elif not _WORKDIR.value:
    raise ConfigError("name a directory for the run, e.g. --workdir=runs/dpo")
  else:
    try:
      summary = train(config, _WORKDIR.value)
    except Stopped as stopped:
      print(stopped)
    else:
      print(dry_run.render_summary(summary))


if __name__ == "__main__":
  main.run(_main)
