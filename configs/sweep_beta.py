"""Twelve runs: three losses at four betas, on the quickstart's generated pairs.

  python scripts/sweep.py --config=configs/sweep_beta.py --workdir=runs/beta

That trains a random model, which needs no file and shows the machinery. For
numbers that mean something start from the quickstart's SFT model:

  python scripts/quickstart.py
  python scripts/sweep.py --workdir=runs/beta \
    --config=configs/sweep_beta.py:model=runs/quickstart/sft/model

The pairs are encoded once, and scored by the reference once, for all runs.
"""

import os
import pathlib
import tempfile

from dpo_jax import sweep
from dpo_jax.config_file import defaults, parse_arg
from dpo_jax.data.corpus import write_corpus


def get_config(arg=None):
  arg = parse_arg(arg, model="", data="runs/corpus")
  config = defaults(loss="dpo")
  config.model.path = arg.model
  if not arg.model:
    config.model.tokenizer = "bytes"
    config.model.width = 96
    config.model.layers = 2
    config.model.heads = 4
    config.model.kv_heads = 2
    config.model.ffn = 256
  config.data.source = _pairs(pathlib.Path(arg.data))
  config.data.max_length = 128
  config.data.eval_rows = 200
  config.data.cache_dir = ""  # the sweep's own
  config.data.row_counts = 1
  config.reference.precompute = True
  config.optim.learning_rate = 1e-4
  config.train.batch_size = 64
  config.train.steps = 120
  config.train.eval_every = 40
  config.train.checkpoint_every = 40
  config.train.export = False
  config.sample.prompts = 100
  config.sample.max_tokens = 48
  config.sample.reward = "dpo_jax.data.corpus:true_reward"
  return config


def get_sweep():
  return sweep.product(
    sweep.listed("loss.name", "dpo", "ipo", "apo_zero"),
    sweep.listed("loss.beta", 0.03, 0.1, 0.3, 1.0),
  )


def _pairs(folder):
  """Writes them where they are not; of several runs at once, one does."""
  path = folder / "pairs.jsonl"
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
      os.replace(write_corpus(place)["pairs"], path)
  return str(path)
