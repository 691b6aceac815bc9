"""Reward accuracy, margins and KL of a checkpoint on any file of pairs.

  python scripts/evaluate.py --config=configs/dpo.py \
    --config.model.path=runs/dpo/model --config.reference.path=MODEL \
    --config.data.source=PAIRS.jsonl --output=evaluation.json

The reference is what the policy started from. Where rows have a `subset`
field, each subset gets its own row, with a 95 % interval. `--config.loss.*`
sets the loss and the beta of the rewards.
"""

import json
import pathlib

from absl import flags

from dpo_jax import main

_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write as well.")


def _main(config):
  from dpo_jax.errors import ConfigError
  from dpo_jax.files import write_whole
  from dpo_jax.judge import judge, render

  output = _OUTPUT.value and pathlib.Path(_OUTPUT.value)
  if output and not output.absolute().parent.is_dir():
    raise ConfigError(f"--output={output}: no such directory")
  result = judge(config)
  if output:  # first: whoever reads what is printed may have seen enough
    write_whole(output, json.dumps(result, indent=2) + "\n")
  print(render(result))


if __name__ == "__main__":
  main.run(_main)
