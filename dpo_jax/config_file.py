"""For files in `configs/`: the defaults as a ConfigDict, and arg strings."""

import collections
import inspect
from typing import Any

import ml_collections

from dpo_jax import losses
from dpo_jax.config import Config


def defaults(loss: str) -> ml_collections.ConfigDict:
  """Every setting at its default (`dpo_jax/config.py` says what each means).

  `config.loss` has a place for the hyper-parameters of all losses and for the
  modifiers, so that `--config.loss.name` can be switched, also to a mixture as
  "dpo+0.2*sft"; what is left at None is the loss's own default, and setting one
  that the loss does not have is an error.
  """
  config = ml_collections.ConfigDict(Config().to_dict())
  config.loss = ml_collections.ConfigDict({"name": loss})
  options = [losses.defaults(name) for name in losses.names()]
  for option, default in collections.ChainMap(
    losses.MODIFIERS, *options
  ).items():
    config.loss[option] = ml_collections.config_dict.placeholder(type(default))
  return config


def on_quickstart(
  config: ml_collections.ConfigDict, root: str, reward_model: bool = False
) -> None:
  """Sets what online runs on the quickstart's corpus have in common: its SFT
  model, the prompts of its pairs, and its true reward, or the reward model of
  `configs/reward.py:quickstart` in its place."""
  config.model.path = f"{root}/sft/model"
  config.data.source = f"{root}/data/pairs.jsonl"
  config.data.max_length = 128
  config.data.eval_rows = 200
  config.data.cache_dir = ""
  config.data.row_counts = 1
  if reward_model:
    config.online.reward_model = f"{root}/reward/model"
  else:
    config.online.reward = "dpo_jax.data.corpus:true_reward"
  config.online.max_tokens = 48
  config.online.missing_end = 1.0
  config.optim.schedule = "constant"
  config.optim.warmup = 0.0
  config.train.eval_batch_size = 200
  config.train.eval_every = 20
  config.train.log_every = 5
  config.sample.batch_size = 256
  config.sample.prompts = 200
  config.sample.max_tokens = 48
  config.sample.reward = "dpo_jax.data.corpus:true_reward"


def parse_arg(arg: str | None, **spec: Any) -> ml_collections.ConfigDict:
  """Parses the part of `--config=file.py:quick,model=x` behind the colon.

  Args:
    arg: comma-separated `key=value`, or `key` alone for True.
    **spec: known keys and their defaults, which fix the types.

  Raises:
    ValueError: an unknown key or a value of the wrong type.
  """
  caller = inspect.stack()[1].filename
  values = dict(spec)
  for part in filter(None, (arg or "").split(",")):
    key, _, text = part.partition("=")
    if key not in spec:
      raise ValueError(
        f"{caller}: unknown switch {key!r}; known: {', '.join(spec)}"
      )
    kind = type(spec[key])
    if kind is bool:
      if text not in ("", "True", "False", "1", "0"):
        raise ValueError(f"{caller}: {key}={text!r} should be True or False")
      values[key] = text in ("", "True", "1")
    else:
      try:
        values[key] = kind(text)
      except ValueError as e:
        raise ValueError(
          f"{caller}: {key}={text!r} should be of type {kind.__name__}"
        ) from e
  return ml_collections.ConfigDict(values)
