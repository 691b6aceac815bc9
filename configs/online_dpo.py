"""Online DPO: the best and the worst of the policy's own answers are a pair.

  python scripts/train.py --config=configs/online_dpo.py \
    --workdir=runs/online_dpo --config.model.path=MODEL \
    --config.data.source=PROMPTS.jsonl \
    --config.online.reward=my_rewards:correct --config.loss.beta=0.1

Any loss of pairs goes with it (--config.loss.name=ipo). The reward is a Python
function of prompt and response, or a trained reward model
(--config.online.reward_model=FOLDER). Data: rows of a prompt alone, or of any
other kind, whose prompts are taken. docs/online.md has the rest.

The arg `quickstart` gives the settings for the generated corpus and its true
reward, after `scripts/quickstart.py` (2 busy CPU cores, 60 steps, 2.5 minutes:
true reward 0.11 -> 1.86, KL 1.6 nats). `quickstart,reward_model`: the reward
is the model of `configs/reward.py:quickstart` (true reward 1.65, KL 3.2):

  python scripts/train.py --config=configs/online_dpo.py:quickstart \
    --workdir=runs/quickstart/online_dpo
"""

from dpo_jax.config_file import defaults, on_quickstart, parse_arg


def get_config(arg=None):
  arg = parse_arg(
    arg, quickstart=False, reward_model=False, root="runs/quickstart"
  )
  config = defaults(loss="dpo")
  config.online.method = "pairs"
  config.online.group = 2
  config.data.eval_rows = 256
  config.optim.learning_rate = 5e-7
  config.train.batch_size = 64
  if arg.quickstart or arg.reward_model:
    on_quickstart(config, arg.root, arg.reward_model)
    config.loss.beta = 0.3
    config.optim.learning_rate = 2e-4
    config.train.batch_size = 32
    config.train.steps = 60
  return config
