"""One task, one SFT model, one budget: each method of alignment, at any beta.

  python scripts/compare_methods.py

The script writes the data, trains the SFT model and then every method; a single
run, after that:

  python scripts/train.py --workdir=runs/methods/try \
    --config=configs/compare_methods.py:method=dpo,dial=0.3,seed=1

The task is that of dpo_jax/data/tastes.py. A budget is a number of responses
that gradients pass through, stage by stage, those of a reward model and of a
value model among them.
"""

from configs import grpo, online_dpo, ppo, quickstart
from dpo_jax.config_file import defaults, parse_arg

TOKENS = 14  # of a response: three words of four bytes, a full stop, the end
BATCH = 32  # pairs, or prompts that are answered twice

# The number that says how far a method goes from the SFT model, at its usual
# place; what it is called; the learning rate. The rates were chosen once, see
# docs/methods.md.
METHODS = {
  "chosen": (None, "", 1e-3),
  "dpo": (0.3, "loss.beta", 1e-3),
  "ipo": (0.1, "loss.beta", 1e-3),
  "kto": (0.3, "loss.beta", 5e-4),
  "orpo": (5.0, "loss.lam", 1e-3),
  "ppo": (0.1, "online.kl", 2e-3),
  "ppo_true": (0.1, "online.kl", 2e-3),
  "grpo": (0.1, "online.kl", 2e-3),
  "online_dpo": (0.3, "loss.beta", 1e-3),
}
_BASES = {
  "ppo": ppo, "ppo_true": ppo, "grpo": grpo, "online_dpo": online_dpo,
}  # fmt: skip
REWARDED = ("ppo", "grpo", "online_dpo")  # by a model, trained before
REWARD_RATE = 1e-3


def get_config(arg=None):
  arg = parse_arg(
    arg, method="dpo", dial=0.0, seed=0, pairs=5000, budget=10240,
    root="runs/methods",
  )  # fmt: skip
  if arg.method in _BASES:
    config = _BASES[arg.method].get_config(f"quickstart,root={arg.root}")
    _online(config, arg)
  else:
    config = quickstart.get_config(f"root={arg.root}")
    config.loss = defaults(loss=_LOSSES.get(arg.method, arg.method)).loss
    _offline(config, arg)
  config.seed = arg.seed
  config.data.max_length = 48
  config.data.max_prompt_length = 24
  config.data.row_counts = 1
  config.data.workers = 1
  config.optim.warmup = 0.1
  config.optim.schedule = "linear"
  config.train.eval_every = 0
  config.train.checkpoint_every = 0
  config.train.log_every = 20
  config.sample.prompts = 0  # the script asks all models at the end
  config.sample.reward = "dpo_jax.data.tastes:true_reward"
  config.sample.max_tokens = TOKENS
  config.sample.batch_size = 512
  if arg.method == "sft":
    _sft(config, arg)
    return config
  config.data.source = f"{arg.root}/data/seed{arg.seed}n{arg.pairs}/pairs.jsonl"
  config.data.eval_source = f"{arg.root}/data/held_out/pairs.jsonl"
  config.data.eval_split, config.data.eval_rows = "train", 0
  if arg.method == "judge":  # trains nothing: whose policies are compared
    config.data.source = config.data.eval_source
    return config
  if config.loss.name == "reward":
    config.optim.learning_rate = REWARD_RATE
    config.sample.reward = ""
    return config
  config.data.eval_source = ""
  dial, name, rate = METHODS[arg.method]
  config.optim.learning_rate = rate
  if name:
    config.update_from_flattened_dict({name: arg.dial or dial})
  return config


_LOSSES = {"chosen": "sft", "best_of_n": "reward", "judge": "dpo"}


def _offline(config, arg):
  # A pair is two responses, whatever is made of it.
  config.train.batch_size = BATCH
  if arg.method in ("chosen", "kto"):
    config.train.batch_size = 2 * BATCH
  config.train.steps = arg.budget // (2 * BATCH)
  if arg.method == "reward":
    config.train.steps //= 2


def _online(config, arg):
  """Half of the budget is the reward model's (the method "reward"), where there
  is one."""
  config.online.reward = "dpo_jax.data.tastes:true_reward"
  budget = arg.budget
  if arg.method in REWARDED:
    budget //= 2
    config.online.reward = ""
    config.online.reward_model = (
      f"{arg.root}/reward seed{arg.seed} n{arg.pairs}/model"
    )
  config.online.max_tokens = TOKENS
  # Answers cost no gradient, so none is trained on twice; and each step passes
  # gradients through 2 * BATCH of them, in PPO through BATCH in two models.
  config.online.epochs = config.online.minibatches = 1
  config.online.group = {"grpo": 4, "online_dpo": 2}.get(arg.method, 1)
  config.train.batch_size = BATCH // 2 if arg.method == "grpo" else BATCH
  config.train.steps = budget // (2 * BATCH)


def _sft(config, arg):
  config.model.path = ""
  config.model.width = 48
  config.model.ffn = 128
  config.data.source = f"{arg.root}/data/sft.jsonl"
  config.data.eval_rows = 0
  config.train.batch_size = 2 * BATCH
  config.train.steps = 400
  config.optim.learning_rate = 4e-3
  config.optim.schedule = "cosine"
