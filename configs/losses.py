"""Any loss, with settings to start from.

  python scripts/train.py --config=configs/losses.py:simpo \
    --workdir=runs/simpo --config.model.path=MODEL \
    --config.data.source=PAIRS.jsonl

The name behind the colon is one of `python -m dpo_jax.losses`, or a mixture as
"dpo+0.005*sft". Hyper-parameters are the papers'. Learning rates are for full
fine-tuning of billions of parameters by AdamW, where the methods' papers and
scripts start or near it; take a hundred times more for models of millions.
docs/losses.md says which loss to take.
"""

from dpo_jax import losses
from dpo_jax.config_file import defaults

# Where not 5e-7.
LEARNING_RATES = {
  "alphapo": 1e-6,
  "cpo": 1e-6,
  "cpo_simpo": 1e-6,
  "orpo": 8e-6,
  "sft": 2e-5,
  "simpo": 1e-6,
  "slic": 1e-6,
}


def get_config(arg=None):
  name = arg or "dpo"
  loss = losses.make(name)
  config = defaults(loss=name)
  config.data.eval_rows = 256
  rates = [LEARNING_RATES.get(term.name, 5e-7) for term in loss.terms]
  config.optim.learning_rate = min(rates)
  config.optim.schedule = "cosine"
  if loss.needs_scores:
    config.sample.prompts = 0  # a reward model answers nothing
  # A pair makes two labelled examples.
  config.train.batch_size = 128 if loss.kind == "unpaired" else 64
  return config
