"""Shows what training would see of a data source, without training.

  python scripts/check_data.py --config=configs/dpo.py \
    --config.model.tokenizer=MODEL --config.data.source=PAIRS.jsonl

Prints the detected format, the counts of dropped and changed rows by reason,
percentiles of the lengths, how well rows pack, and the first packed row, token
by token with what each token sees. `--visible` draws its mask as well.
"""

from absl import flags

from dpo_jax import main

_VISIBLE = flags.DEFINE_bool("visible", False, "Draw the mask of row 0.")


def _main(config):
  from dpo_jax.check_data import check

  print(check(config, visible=_VISIBLE.value))


if __name__ == "__main__":
  main.run(_main)
