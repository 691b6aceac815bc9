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
_ALLOW = flags.DEFINE_list(
  "allow", [], "Settings that may differ from those the run began with."
)


def _main(config):
  from dpo_jax import dry_run, processes
  from dpo_jax.errors import ConfigError
  from dpo_jax.train import train

  if _PRINT.value:
    print(dry_run.render_config(config))
  elif _DRY.value:
    print(dry_run.describe(config))
  elif not _WORKDIR.value:
    raise ConfigError("name a directory for the run, e.g. --workdir=runs/dpo")
  else:
    summary = train(config, _WORKDIR.value, _ALLOW.value)
    if processes.leads():
      print(dry_run.render_summary(summary))


if __name__ == "__main__":
  main.run(_main, many=True, goes_on=True)
