"""The quickstart: SFT then DPO of a byte-level model on a generated corpus.

  python scripts/quickstart.py

2 CPU cores, about 3 minutes. `scripts/quickstart.py` writes the corpus and runs
both stages; each can be run alone, after it has:

  python scripts/train.py --config=configs/quickstart.py:stage=sft \
    --workdir=runs/quickstart/sft
"""

from dpo_jax.config_file import defaults, parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, stage="dpo", root="runs/quickstart")
  config = defaults(loss=arg.stage)
  config.model.tokenizer = "bytes"
  config.model.width = 96
  config.model.layers = 2
  config.model.heads = 4
  config.model.kv_heads = 2
  config.model.ffn = 256
  config.data.max_length = 128
  config.data.eval_rows = 200
  config.data.cache_dir = ""
  config.data.row_counts = 1
  config.train.batch_size = 64
  config.train.eval_every = 50
  config.train.checkpoint_every = 100
  config.sample.prompts = 200
  config.sample.max_tokens = 48
  config.sample.reward = "dpo_jax.data.corpus:true_reward"
  if arg.stage == "sft":
    config.data.source = f"{arg.root}/data/sft.jsonl"
    config.train.steps = 300
    config.optim.learning_rate = 4e-3
    config.optim.schedule = "cosine"
  else:
    config.model.path = f"{arg.root}/sft/model"
    config.data.source = f"{arg.root}/data/pairs.jsonl"
    config.loss.beta = 0.3
    config.train.steps = 120
    config.optim.learning_rate = 1e-4
  return config
