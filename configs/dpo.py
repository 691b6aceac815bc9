"""DPO from an SFT checkpoint and preference pairs.

  python scripts/train.py --config=configs/dpo.py --workdir=runs/dpo \
    --config.model.path=MODEL --config.data.source=PAIRS.jsonl \
    --config.loss.beta=0.2

The arg `lora` trains adapters on a base that stays, once in memory and in
bfloat16: --config=configs/dpo.py:lora --config.lora.rank=32.

Data: prompt/chosen/rejected as text or messages, or HH transcripts. The arg
`tone` gives the settings for the small politeness data and the 260k-parameter
model of the tests (2 CPU cores, 126 steps, 1 minute: held-out loss 0.21
to 0.30 by the seed, accuracy 0.9; `tone,lora` trains adapters):

  python scripts/train.py --config=configs/dpo.py:tone --workdir=runs/tone \
    --config.model.path=../shared/data/stories260k/hf \
    --config.data.source=../shared/data/tone_pairs/pairs.jsonl.gz
"""

from dpo_jax.config_file import defaults, parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tone=False, lora=False)
  config = defaults(loss="dpo")
  config.data.eval_rows = 256
  config.optim.learning_rate = 1e-6
  config.train.batch_size = 64
  if arg.lora:
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optim.learning_rate = 1e-5  # ten times that of all weights
    config.model.dtype = config.model.param_dtype = "bfloat16"
  if arg.tone:
    config.data.max_length = 512
    config.data.max_prompt_length = 384
    config.data.eval_rows = 100
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "constant"
    config.optim.warmup = 0.0
    config.train.batch_size = 16
    config.train.steps = 126
    if arg.lora:
      config.model.dtype = config.model.param_dtype = "float32"
    config.train.eval_every = 63
    config.train.log_every = 1
  return config
