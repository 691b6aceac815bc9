"""Every loss on the quickstart's task, from one SFT checkpoint, at one budget.

  python scripts/compare_losses.py

The script writes the data, trains the SFT model and then each loss; a single
one, after that:

  python scripts/train.py --config=configs/compare_losses.py:loss=simpo \
    --workdir="runs/compare/loss simpo"

The answers are 34 bytes long and the model is tiny, so these are not the values
for a large model: `configs/losses.py` has those. They were set by hand, after
one look at what the first guess gave, so that most losses go about as far from
the SFT model; a loss at its best may do better.
"""

from configs import quickstart
from dpo_jax import losses
from dpo_jax.config_file import defaults, parse_arg

# Hyper-parameters that differ from the loss's own defaults.
OPTIONS = {
  "alphapo": {"beta": 20.0, "gamma": 1.0},
  "aot": {"beta": 0.3},
  "aot_unpaired": {"beta": 0.3},
  "apo_down": {"beta": 0.3},
  "apo_zero": {"beta": 0.3},
  "apo_zero_unpaired": {"beta": 0.3},
  "bco": {"beta": 0.3},
  "bco_pair": {"beta": 0.3},
  "cpo_simpo": {"beta": 20.0, "gamma": 1.0},
  "discopop": {"beta": 0.3},
  "dpo": {"beta": 0.3},
  "dpop": {"beta": 0.3, "lam": 1.0},
  "exo": {"beta": 0.3, "label_smoothing": 0.1},
  "hinge": {"beta": 0.3},
  "ipo": {"beta": 0.1},
  "kto": {"beta": 0.3},
  "nca": {"beta": 0.3},
  "orpo": {"lam": 1.0},
  "plackett_luce": {"beta": 0.3},
  "r_dpo": {"beta": 0.3},
  "robust": {"beta": 0.3},
  "sigmoid_norm": {"beta": 20.0},
  "simpo": {"beta": 20.0, "gamma": 1.0},
  "slic": {"delta": 5.0},
  "sppo": {"beta": 0.1},
  "tpo": {"beta": 0.1},
  "tpo_l": {"beta": 20.0, "gamma": 1.0},
}
# What trains on rankings; the rest takes pairs.
SOURCES = {"ranked": "rankings", "sft": "pairs"}


def get_config(arg=None):
  arg = parse_arg(arg, loss="dpo", root="runs/compare")
  loss = losses.make(arg.loss)
  config = quickstart.get_config(f"root={arg.root}")
  config.loss = defaults(loss=arg.loss).loss
  # A mixture's options stand in its name: "dpo(beta=0.3)+0.1*sft".
  config.loss.update(OPTIONS.get(arg.loss, {}))
  source = SOURCES.get(loss.kind, "pairs")
  config.data.source = f"{arg.root}/data/{source}.jsonl"
  config.train.steps = 60
  config.train.eval_every = 0
  config.optim.learning_rate = 2e-4
  # A pair makes two labelled examples.
  config.train.batch_size = 128 if loss.kind == "unpaired" else 64
  config.sample.prompts = 0  # the script asks all models at the end
  return config
