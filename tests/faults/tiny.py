"""A run of seconds for the tests of faults: `--config=tests/faults/tiny.py:DIR`
with the folder of a generated corpus."""

import pathlib

from dpo_jax.config_file import defaults


def get_config(corpus):
  config = defaults(loss="dpo")
  config.model.tokenizer = "bytes"
  config.model.width = 16
  config.model.layers = 2
  config.model.heads = 2
  config.model.kv_heads = 2
  config.model.ffn = 32
  config.data.source = str(pathlib.Path(corpus) / "pairs.jsonl")
  config.data.eval_rows = 8
  config.data.cache_dir = ""
  config.data.row_length = 256
  config.data.row_counts = 1  # one shape to compile
  config.optim.learning_rate = 1e-3
  # Adam divides a gradient near zero by its own rounding otherwise, and other
  # orders of adding would show.
  config.optim.epsilon = 1e-3
  config.train.batch_size = 16
  config.train.steps = 10
  config.train.log_every = 1
  config.train.eval_every = 0
  config.train.checkpoint_every = 5
  config.train.export = False
  config.sample.prompts = 0
  return config
