"""PPO: a reward less the price of leaving the reference, and a value model.

  python scripts/train.py --config=configs/ppo.py --workdir=runs/ppo \
    --config.model.path=MODEL --config.data.source=PROMPTS.jsonl \
    --config.online.reward_model=REWARD_MODEL

The reward is a trained reward model (configs/reward.py makes one), whose
weights the value model starts from, or a Python function of prompt and
response (--config.online.reward=my_rewards:correct), and then the value model
starts from the policy. Data: rows of a prompt alone, or of any other kind,
whose prompts are taken. docs/online.md has the rest.

The arg `quickstart` gives the settings for the generated corpus and its true
reward, after `scripts/quickstart.py` (2 busy CPU cores, 60 steps, 5 minutes:
true reward 0.11 -> 1.87, KL 3.3 nats). `quickstart,reward_model`: the reward
is the model of `configs/reward.py:quickstart` (true reward 1.40, KL 7.1):

  python scripts/train.py --config=configs/ppo.py:quickstart \
    --workdir=runs/quickstart/ppo
"""

from dpo_jax.config_file import defaults, on_quickstart, parse_arg


def get_config(arg=None):
  arg = parse_arg(
    arg, quickstart=False, reward_model=False, root="runs/quickstart"
  )
  config = defaults(loss="dpo")
  config.online.method = "ppo"
  config.online.epochs = 4
  config.online.kl = 0.05
  config.data.eval_rows = 256
  config.optim.learning_rate = 3e-6
  config.train.batch_size = 64
  if arg.quickstart or arg.reward_model:
    on_quickstart(config, arg.root, arg.reward_model)
    config.online.epochs = 2
    config.online.minibatches = 2
    config.optim.learning_rate = 5e-4
    config.train.steps = 60
  return config
