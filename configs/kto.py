"""KTO: from thumbs up and thumbs down, without pairs.

  python scripts/train.py --config=configs/kto.py --workdir=runs/kto \
    --config.model.path=MODEL --config.data.source=LABELLED.jsonl

Data: prompt/completion/label as text or messages; pairs are taken as one good
and one bad example each. With unequal classes set `desirable_weight` and
`undesirable_weight` so that weight times count is about equal.
"""

from dpo_jax.config_file import defaults


def get_config():
  config = defaults(loss="kto")
  config.data.eval_rows = 256
  config.optim.learning_rate = 1e-6
  config.train.batch_size = 128
  return config
