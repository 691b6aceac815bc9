"""IPO: for preferences that are deterministic, or nearly so.

  python scripts/train.py --config=configs/ipo.py --workdir=runs/ipo \
    --config.model.path=MODEL --config.data.source=PAIRS.jsonl

The loss stops widening the margin at 1/(2 beta) nats, 5 at beta 0.1, where DPO
goes on. `--config.loss.average=tokens` is the form of TRL and HALOs.
"""

from dpo_jax.config_file import defaults


def get_config():
  config = defaults(loss="ipo")
  config.data.eval_rows = 256
  config.optim.learning_rate = 1e-6
  config.train.batch_size = 64
  return config
