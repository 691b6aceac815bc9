"""A reward model from preference pairs: what PPO and best-of-n are judged by.

  python scripts/train.py --config=configs/reward.py --workdir=runs/reward \
    --config.model.path=MODEL --config.data.source=PAIRS.jsonl

MODEL is a language model, best the SFT model that made the answers, whose
unembedding gives way to a scalar head; or a reward model to go on from.
`runs/reward/model` is a folder for `AutoModelForSequenceClassification`, and
for

  python scripts/evaluate.py --config=configs/reward.py \
    --config.model.path=runs/reward/model --config.data.source=PAIRS.jsonl

Evaluation has the accuracy on held-out pairs and how far the probabilities are
to be believed (`calibration_error`). One epoch, as reward models overfit in the
second; learning rate and schedule as of Llama 2 (2307.09288, section 3.2.2).
`--config.loss.centering=0.01` keeps scores around 0.

The arg `quickstart` trains on the generated corpus, from the SFT model that
`scripts/quickstart.py` leaves (2 CPU cores, 120 steps, a minute; on 200
held-out pairs loss 0.57 and accuracy 0.67, on another machine, whose SFT model
rounded otherwise, 0.56 and 0.71; the true reward itself has 0.49 and 0.73):

  python scripts/train.py --config=configs/reward.py:quickstart \
    --workdir=runs/quickstart/reward
"""

from configs import quickstart
from dpo_jax.config_file import defaults, parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, quickstart=False, root="runs/quickstart")
  if arg.quickstart:
    config = quickstart.get_config(f"root={arg.root}")
    config.loss = defaults(loss="reward").loss
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    config.sample.reward = ""
  else:
    config = defaults(loss="reward")
    config.data.eval_rows = 256
    config.optim.learning_rate = 1e-5
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.03
    config.optim.final = 0.1
    config.train.batch_size = 64
  config.sample.prompts = 0  # a reward model answers nothing
  return config
