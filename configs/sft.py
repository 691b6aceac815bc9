"""Supervised fine-tuning, the stage before preferences.

  python scripts/train.py --config=configs/sft.py --workdir=runs/sft \
    --config.model.path=MODEL --config.data.source=DATA.jsonl

Data: prompt/completion, `messages`, or the chosen side of pairs. Learning rate
as usual for full fine-tuning of billions of parameters; take 1e-4 to 1e-3 for
models of millions.
"""

from dpo_jax.config_file import defaults


def get_config():
  config = defaults(loss="sft")
  config.data.eval_rows = 256
  config.optim.learning_rate = 2e-5
  config.optim.schedule = "cosine"
  config.optim.warmup = 0.03
  config.train.batch_size = 64
  return config
