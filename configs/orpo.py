"""ORPO: imitation and preference in one stage, no reference model.

  python scripts/train.py --config=configs/orpo.py --workdir=runs/orpo \
    --config.model.path=MODEL --config.data.source=PAIRS.jsonl

Starts from a base model; `--config.loss.lam` weighs the preference term.
"""

from dpo_jax.config_file import defaults


def get_config():
  config = defaults(loss="orpo")
  config.data.eval_rows = 256
  config.optim.learning_rate = 8e-6
  config.train.batch_size = 64
  return config
