"""GRPO: answers of the policy, compared within the answers to one prompt.

  python scripts/train.py --config=configs/grpo.py --workdir=runs/grpo \
    --config.model.path=MODEL --config.data.source=PROMPTS.jsonl \
    --config.online.reward=my_rewards:correct

The reward is a Python function of prompt and response, or a trained reward
model (--config.online.reward_model=FOLDER). Data: rows of a prompt alone, or of
any other kind, whose prompts are taken. docs/online.md has the rest.

The arg `quickstart` gives the settings for the generated corpus and its true
reward, after `scripts/quickstart.py` (2 busy CPU cores, 60 steps, 2.5 minutes:
true reward 0.11 -> 1.79, KL 6.4 nats). `quickstart,reward_model`: the reward
is the model of `configs/reward.py:quickstart`, and KL costs more (true reward
1.51, KL 2.6; at the price of 0.04 the model is fooled, see docs/online.md):

  python scripts/train.py --config=configs/grpo.py:quickstart \
    --workdir=runs/quickstart/grpo
"""

from dpo_jax.config_file import defaults, on_quickstart, parse_arg


def get_config(arg=None):
  arg = parse_arg(
    arg, quickstart=False, reward_model=False, root="runs/quickstart"
  )
  config = defaults(loss="dpo")
  config.online.method = "grpo"
  config.online.group = 8
  config.online.kl = 0.04
  config.data.eval_rows = 256
  config.optim.learning_rate = 1e-6
  config.train.batch_size = 32
  if arg.quickstart or arg.reward_model:
    on_quickstart(config, arg.root, arg.reward_model)
    config.online.group = 4
    if arg.reward_model:
      config.online.kl = 0.3
    config.optim.learning_rate = 5e-4
    config.train.batch_size = 16
    config.train.steps = 60
  return config
